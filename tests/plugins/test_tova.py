from kvpolicy_baselines.tova import TOVAPolicy

from kvpolicy.testing import check_eviction_policy
from tests.plugins.direct import assert_decodes_like, assert_keeps_the_best, softmax


def test_laws():
    check_eviction_policy(TOVAPolicy)


def test_a_prompt_keeps_what_its_last_query_attends_to():
    assert_keeps_the_best("tova", lambda layer, head, attention, key: [sum(w) for w in attention[:, -1].T.tolist()])


def last_query(queries, keys):
    return [sum(group) for group in zip(*(softmax(rows[-1], keys) for rows in queries), strict=True)]


def this_query(scores, queries, keys):
    mass = [softmax(query, list(keys.values())) for query in queries]
    return dict(zip(keys, (sum(group) for group in zip(*mass, strict=True)), strict=True))


def test_decoding_drops_what_the_query_before_attended_to_least():
    kept = assert_decodes_like(TOVAPolicy(), last_query, this_query)
    assert any(max(set(range(48)) - set(positions)) >= 40 for positions in kept), "decoded tokens go as well"


def test_sink_tokens_can_be_protected():
    kept = assert_decodes_like(TOVAPolicy(num_sink_tokens=2), last_query, this_query, sinks=2)
    assert all(positions[:2] == [0, 1] for positions in kept)
