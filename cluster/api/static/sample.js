// An example document: made-up harbour records with facts of the form that `ledger` understands.

const SENTENCES = [
  "The harbour office keeps its records in the old tower by the river.",
  "A ship from the north came in before the storm and left the next morning.",
  "The captain said that the cargo was in good condition and asked for another week.",
  "Nobody in the street could remember when the lamp over the gate was lit last.",
  "The letter was sent to the company, but the answer never came.",
  "In the second year the price of the passage was higher than before.",
  "The gardener found a key under the stones and brought it to the office.",
  "Every parcel has a number, and every number stands in the book.",
  "The merchant would not wait any longer and sold the rest of the timber.",
  "There was little to see from the hall except the water and the far bank.",
  "The children of the school were allowed to look at the great map.",
  "When the machine was tried for the first time, the whole town came to watch.",
  "The committee met again in the winter and could not agree on the colour of the doors.",
  "Some of the pages are missing, and others are written in a hand that few can read.",
  "The engineer made a drawing of the bridge and left it with the clerk.",
  "It is said that the garden behind the church is older than the town itself.",
  "The second ship was smaller, and it carried salt and a few letters.",
  "The teacher wrote down what the old man told her, word for word.",
  "Between the two houses there is a wall that belongs to neither of them.",
  "The president of the society thanked everyone and closed the meeting early.",
];

const SYLLABLES = [..."bdfgklmnprstvz"].flatMap((c) => [..."aeiou"].map((v) => c + v));

// A small generator with a seed: the same number gives the same document (mulberry32).
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function name(random) {
  const length = 3 + Math.floor(random() * 3);
  return Array.from({ length }, () => SYLLABLES[Math.floor(random() * SYLLABLES.length)]).join("");
}

// {text, questions}: the last question has no answer in the text.
export function sample(seed, { sentences = 420, facts = 20 } = {}) {
  const random = generator(seed);
  const pick = (list) => list[Math.floor(random() * list.length)];
  const names = new Set();
  while (names.size < facts + 1) names.add(name(random));
  const [absent, ...known] = names;
  const lines = Array.from({ length: sentences }, () => pick(SENTENCES));
  const places = new Set();
  while (places.size < facts) places.add(10 + Math.floor(random() * (sentences - 20)));
  [...places].forEach((place, at) => {
    const code = String(Math.floor(random() * 10000)).padStart(4, "0");
    lines[place] = `${lines[place]} the code of ${known[at]} is ${code}.`;
  });
  let text = "";
  lines.forEach((line, at) => {
    text += line + ((at + 1) % 7 ? " " : "\n\n");
  });
  const asked = [known[0], known[1], known[2], absent];
  return { text: text.trimEnd(), questions: asked.map((each) => `what is the code of ${each}?`) };
}
