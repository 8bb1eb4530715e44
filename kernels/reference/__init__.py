"""What each op means, in plain torch: the specification that every faster backend is tested
against.
"""
