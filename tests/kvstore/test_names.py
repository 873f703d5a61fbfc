"""Names are the wire format of the cache: equal content, equal name, on every host and in every version."""

import pytest

from kvstore.names import FRAGMENT_KEY_BYTES, block_name, block_names, fingerprint, fragment_key, root_name

FIELDS = {"model": "demo", "dtype": "bfloat16", "num_layers": 8, "rope_theta": 10000.0}
ROOT = root_name(fingerprint(FIELDS), b"")


def test_names_do_not_change_between_versions() -> None:
    # Hosts of different versions share a Redis: a change here must come with a new key prefix there.
    assert fingerprint(FIELDS).hex() == "d94036074ee1a0b61ad41519cc6bc6e8"
    assert ROOT.hex() == "2501ab91b8a91235470fcb1ae0b96a70"
    assert block_name(ROOT, [1, 2, 3]).hex() == "6f4a7bda2702b963bf59d8f552a5f531"
    with_adapter = root_name(fingerprint(FIELDS), b"", b"\1" * 32)
    assert with_adapter.hex() == "cf7182b2637512779e5ed5f219a101b5"
    assert fragment_key(bytes(range(16)), 1, 2, 3).hex() == "000102030405060708090a0b0c0d0e0f010002000300"


def test_order_of_fields_does_not_matter_and_every_value_does() -> None:
    assert fingerprint(dict(reversed(FIELDS.items()))) == fingerprint(FIELDS)
    changed = [fingerprint({**FIELDS, key: "other"}) for key in FIELDS]
    assert len({fingerprint(FIELDS), *changed}) == 1 + len(FIELDS)


def test_a_field_that_has_no_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint({"dtype": object()})
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint({"rope_theta": float("nan")})


def test_tenants_share_nothing() -> None:
    tenants = [root_name(fingerprint(FIELDS), salt) for salt in (b"", b"a", b"b")]
    names = {block_name(root, [1, 2, 3]) for root in tenants}
    assert len(names) == 3


def test_salt_and_fingerprint_do_not_run_into_each_other() -> None:
    assert root_name(b"ab", b"c") != root_name(b"a", b"bc")


def test_adapters_share_no_blocks_with_each_other_or_the_base():
    salts, adapters = (b"", b"a", b"bc"), (b"", b"b", b"ba", b"c")
    roots = [root_name(fingerprint(FIELDS), salt, adapter) for salt in salts for adapter in adapters]
    assert len(set(roots)) == len(roots)
    assert root_name(b"f", b"salt", b"") == root_name(b"f", b"salt")


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 32, 37])
def test_block_names_chain(num_tokens: int) -> None:
    token_ids = list(range(1000, 1000 + num_tokens))
    names = block_names(ROOT, token_ids, 16, with_tail=True)
    assert len(names) == -(-num_tokens // 16)
    parent = ROOT
    for i, name in enumerate(names):
        assert name == block_name(parent, token_ids[16 * i : 16 * i + 16])
        parent = name
    assert block_names(ROOT, token_ids, 16, with_tail=False) == names[: num_tokens // 16]


def test_a_tail_is_named_by_exactly_its_tokens() -> None:
    tails = {block_names(ROOT, list(range(n)), 16, with_tail=True)[-1] for n in range(1, 17)}
    assert len(tails) == 16


def test_a_different_token_changes_all_later_names() -> None:
    left = block_names(ROOT, [1] * 48, 16, with_tail=False)
    right = block_names(ROOT, [1] * 20 + [2] + [1] * 27, 16, with_tail=False)
    assert [a == b for a, b in zip(left, right, strict=True)] == [True, False, False]


def test_token_ids_beyond_32_bits_are_refused() -> None:
    with pytest.raises(OverflowError):
        block_name(ROOT, [1 << 32])
    with pytest.raises(OverflowError):
        block_name(ROOT, [-1])


def test_fragment_keys_are_distinct() -> None:
    keys = {fragment_key(ROOT, layer, count, head) for layer in range(4) for count in (1, 2) for head in range(3)}
    assert len(keys) == 24
    assert {len(key) for key in keys} == {FRAGMENT_KEY_BYTES}
