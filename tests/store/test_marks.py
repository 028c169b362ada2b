"""Marks of written shards: told by one listing, and one that is damaged is none."""

import sys
from pathlib import Path

from distspec.store import SpectraStore
from tests.support.processes import started


def test_a_shard_is_written_while_its_mark_is_there(store: SpectraStore) -> None:
    folder = Path(store.path) / "base/commits/c"
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "2"]
    store.base.reopen(1)
    assert sorted(path.name for path in folder.iterdir()) == ["0", "2"]
    assert (store.base.pending(), store.base.written()) == ([1], [0, 2])
    # What a killed writer, or another program, leaves beside the marks.
    (folder / "1.0abc.partial").write_bytes(b"")
    (folder / "17").write_bytes(b"12345678")
    assert SpectraStore.open(store.path).pending() == [1]


def test_marks_may_come_and_go_while_they_are_listed(store: SpectraStore) -> None:
    layer = store.create_layer("score-0", {"mse": ("f4", ())})
    program = (
        "import sys; from distspec.store import SpectraStore\n"
        f"layer = SpectraStore.open({store.path!r}, write=True).layer('score-0')\n"
        "from distspec.store.marks import set_mark\n"
        "for number in range(600): set_mark(layer._group, number % 3, number % 2)\n"
    )
    with started([sys.executable, "-c", program]) as process:
        while process.poll() is None:
            assert set(layer.written()) <= {0, 1, 2}
        assert process.returncode == 0


def test_a_layer_without_any_mark_is_pending(store: SpectraStore) -> None:
    assert store.create_layer("score-0", {"mse": ("f4", ())}).written() == []


def test_a_shard_whose_mark_is_damaged_is_written_again(store: SpectraStore) -> None:
    mark = Path(store.path) / "base/commits/c/1"
    content = mark.read_bytes()
    for damaged in (b"", content[:3], content * 2):
        mark.write_bytes(damaged)
        assert SpectraStore.open(store.path).pending() == [1]
    mark.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert "rows 16-32 are not what their mark says" in SpectraStore.open(store.path).base.verify(1)
