"""`GET /cluster/routes/{request_id}`: how a request was routed, and what every worker would have
cost. Of the last requests of this front, and only of the asking key's own tenant.
"""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from cluster.api.errors import HttpError
from cluster.api.intake import state_of
from penstock.identity import tenant_tag

router = APIRouter()


@router.get("/cluster/routes/{request_id}")
async def route(request: Request, request_id: str) -> Response:
    """The table of costs of a request, by the `id` of its answer. 404 once this front has forgotten
    it: it remembers the last 512, fewer in large pools. Nothing of the prompt is in it.
    """
    state = state_of(request)
    tenant: str = request.scope["penstock.tenant"]
    told = await state.service.route_told(
        request_id, tenant=tenant_tag(state.config.cluster_key_bytes, tenant)
    )
    if told is None:
        raise HttpError(
            404,
            "this front remembers no such request of yours; it keeps the last few hundred, and "
            "other fronts keep their own",
            code="route_not_found",
        )
    body = orjson.dumps(told.to_json())
    return Response(body, media_type="application/json", headers={"cache-control": "no-store"})
