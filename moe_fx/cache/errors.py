"""Why a compilation is not kept: an exception of the cache's own, never seen by a user as such."""


class Uncacheable(Exception):
    """The cache does not apply to a graph; the message says what stands in the way."""
