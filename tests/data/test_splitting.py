"""Which file belongs to which split: shares, duplicates, ranges."""

import random

import pytest

from attnlab.data.splitting import SPLITS, split_files


def random_text(generator, lines):
    return "".join(f"{generator.random()} {generator.random()}\n" for _ in range(lines)).encode()


def files(count, seed=0, lines=(5, 60)):
    generator = random.Random(seed)
    return {f"d{i % 4}/{i:03d}": random_text(generator, generator.randint(*lines)) for i in range(count)}


def where(plan):
    return {part.path: split for split, parts in plan.parts.items() for part in parts}


@pytest.mark.parametrize("count", [10, 40, 300])
def test_by_file_about_90_5_5_and_disjoint(count):
    content = files(count)
    plan = split_files(content, content.get)
    assert not plan.by_range and set(where(plan)) == set(content)
    assert sum(len(parts) for parts in plan.parts.values()) == count
    total = sum(map(len, content.values()))
    for split in ("validation", "test"):
        share = plan.bytes(split) / total
        assert 0.04 < share < 0.08 if count >= 40 else share > 0
    assert all((part.start, part.stop) == (0, len(content[part.path])) for part in plan.parts["train"])


def test_identical_and_near_identical_files_never_lie_in_two_splits():
    generator = random.Random(1)
    content = files(60, seed=2)
    for i in range(30):
        lines = content[f"d{i % 4}/{i:03d}"].splitlines(keepends=True)
        content[f"copy/{i}"] = b"".join(lines)
        changed = list(lines)
        changed[generator.randrange(len(changed))] = b"another line\n"
        content[f"edited/{i}"] = b"   ".join(changed) + b"\n\n"  # other white space, too
    plan = split_files(content, content.get)
    split_of = where(plan)
    assert plan.duplicates == 30
    for i in range(30):
        names = [name for name in (f"d{i % 4}/{i:03d}", f"copy/{i}", f"edited/{i}") if name in split_of]
        assert len(names) == 2 and len({split_of[name] for name in names}) == 1
    # and no line of a train file in a held-out file, since every line of this set is a random number
    lines = {split: {x.strip() for p in plan.parts[split] for x in content[p.path].split(b"\n")} for split in SPLITS}
    common = {b"", b"another line"}
    assert lines["train"] & lines["test"] <= common and lines["train"] & lines["validation"] <= common
    assert lines["validation"] & lines["test"] <= common


def test_order_of_paths_and_new_files_do_not_reshuffle():
    content = files(200)
    plan = split_files(content, content.get)
    assert plan == split_files(reversed(list(content)), content.get)
    more = {**content, **{f"new/{name}": text for name, text in files(4, seed=9).items()}}
    before, after = where(plan), where(split_files(more, more.get))
    assert sum(before[name] != after[name] for name in content) <= 10
    assert plan.content_sha256 != split_files(more, more.get).content_sha256


def test_content_hash_sees_names_and_bytes():
    content = files(12)
    first = next(iter(content))
    base = split_files(content, content.get).content_sha256
    changed = {**content, first: content[first] + b"x\n"}
    renamed = {("other" if name == first else name): text for name, text in content.items()}
    assert len({base, *(split_files(c, c.get).content_sha256 for c in (changed, renamed))}) == 3


@pytest.mark.parametrize("count", [1, 9])
def test_few_files_are_cut_into_ranges(count):
    content = files(count, lines=(200, 300))
    plan = split_files(content, content.get)
    assert plan.by_range
    for name, text in content.items():
        parts = [part for split in SPLITS for part in plan.parts[split] if part.path == name]
        assert b"".join(text[part.start : part.stop] for part in parts) == text and len(parts) == 3
        assert all(text[part.start - 1 : part.start] == b"\n" for part in parts[1:])  # cut between lines
    assert plan.bytes("train") / sum(map(len, content.values())) == pytest.approx(0.9, abs=0.02)


def test_ranges_of_one_long_line_are_cut_between_characters():
    text = "ж注a".encode() * 1000
    plan = split_files(["a"], lambda name: text)
    for split in SPLITS:
        (part,) = plan.parts[split]
        text[part.start : part.stop].decode("utf-8")


def test_near_identical_files_cut_by_range_keep_only_one():
    (text,) = files(1, lines=(200, 200)).values()
    content = {"a": text, "b": text + b"one more line\n"}
    plan = split_files(content, content.get)
    assert plan.by_range and set(where(plan)) == {"a"} and plan.duplicates == 1


def test_empty_and_refused_files_are_left_out():
    content = {**files(12), "empty": b"", "blank": b" \n\n", "refused": None}
    plan = split_files(content, content.get)
    assert plan.empty == 2 and not {"empty", "blank", "refused"} & set(where(plan))
    assert not any(split_files([], content.get).parts.values())
