"""All that a store holds, comparable."""


def snapshot(store):
    """Positions, scores, keys and values of each segment in order of position, tables and counts."""
    state = [store.capacities.tolist(), store.lengths.tolist(), store.seen.tolist()]
    for index, held in enumerate(store.layers):
        arena, segments = held.arena, []
        for start, positions in zip(arena.start.tolist(), store.positions(index), strict=True):
            rows = start + positions.argsort()
            names = (
                ("positions", "keys", "values") if arena.scores is None else ("positions", "scores", "keys", "values")
            )
            segments.append([getattr(arena, name)[rows].tolist() for name in names])
        pending = held.pending and [held.pending.positions.tolist(), held.pending.key.tolist()]
        state += [segments, held.seen.tolist(), held.evicted_at.tolist(), pending]
    return state
