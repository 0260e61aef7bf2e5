"""Where states are held: rooms, spilling from GPUs that tests make up, and the memory that control groups leave."""

import math

import pytest
import torch
from families import V, toy
from searching import cached, exhaustive, race, streamed

from lib.decoder import Decoder
from lib.evaluate import Objective, next_token
from lib.memory import HOST, Store, _free_on_host, rooms
from lib.trajectories import Trajectories

WINDOWS = torch.randint(V, (5, 24), generator=torch.Generator().manual_seed(1))
STATE = 2 * 24 * 32 * 4  # bytes of the state of two windows, hidden size 32, float32
PINNED = 8192  # what it takes in pinned memory
GPUS = [torch.device("cuda:0"), torch.device("cuda:1")]


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; what it holds is in the host's memory."""

    is_cuda, device, pins = True, GPUS[0], True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.empty_like and kwargs["pin_memory"] and kwargs["device"] == HOST:
            if not cls.pins:
                raise RuntimeError("no more memory can be pinned")
            return torch.empty_like(plain(args[0])).as_subclass(Pinned)
        return super().__torch_function__(func, types, args, kwargs)


class OnOther(OnGpu):
    device = GPUS[1]


class Pinned(OnOther):
    is_cuda, device = False, HOST

    def is_pinned(self):
        return True

    def to(self, device, non_blocking=False):
        return plain(self).as_subclass(OnOther if device == GPUS[1] else OnGpu)


class Watched(Store):
    """A Store whose every put and drop is compared with what is really held."""

    def __init__(self, rooms):
        super().__init__(rooms)
        self.first, self.held, self.most = dict(rooms), [], {}

    def put(self, h, must=False):
        held = super().put(h, must)
        if held is not None:
            self.held.append(held)
        for device in {held.device for held in self.held}:
            sizes = [held.nbytes for held in self.held if held.device == device]
            taken = sum(2 ** math.ceil(math.log2(size)) for size in sizes) if device == HOST else sum(sizes)
            self.most[device] = max(taken, self.most.get(device, 0))
            assert self.rooms[device] == self.first.get(device, 0) - taken
            assert must or taken <= self.first.get(device, 0)
        return held

    def drop(self, held):
        super().drop(held)
        del self.held[next(k for k, h in enumerate(self.held) if h is held)]


def plain(h):
    return h.as_subclass(torch.Tensor)


def on_gpus(decoder, gpus):
    """Make the decoder's states say they are on GPUs, each layer on the next of `gpus`."""
    embed, run = decoder.embed, decoder.run

    def embed_there(ids):
        stream = embed(ids)
        return stream._replace(h=stream.h.as_subclass(OnGpu))

    def run_there(i, kinds, h, stream):
        assert h.is_cuda
        kind = OnOther if gpus[i % len(gpus)] == GPUS[1] else OnGpu
        return plain(run(i, kinds, plain(h), stream)).clone().as_subclass(kind)

    decoder.embed, decoder.run = embed_there, run_there


def goal(decoder, batches):
    objective = next_token(decoder, batches)
    return Objective(lambda k, h: objective.losses(k, plain(h)), objective.score)


@pytest.fixture
def watched(monkeypatch):
    """Return a function that runs an engine on made-up GPUs with these rooms: -> (steps, its Store, its batches)."""

    def run(engine, given, gpus=GPUS[:1], **options):
        stores, batches = [], []
        decoder = Decoder(toy("llama", num_hidden_layers=4))
        on_gpus(decoder, gpus)
        monkeypatch.setattr("lib.engines.rooms", lambda devices, cache_bytes: given)
        monkeypatch.setattr("lib.engines.Store", lambda rooms: stores.append(Watched(rooms)) or stores[-1])
        monkeypatch.setattr("lib.engines.Trajectories", lambda *a: batches.append(Trajectories(*a)) or batches[-1])
        steps = list(engine(decoder, decoder.blocks(), WINDOWS, 4, batch_size=2, objective=goal, **options))
        return [(s.block, s.scores) for s in steps], stores[0], batches

    return run


@pytest.mark.parametrize("engine, options", [(cached, {}), (race, {"confidence": 1.0})])
@pytest.mark.parametrize("gpu, host", [(0, 0), (10, 0), (0, 10), (10, 10), (10**6, 0), (0, 10**6)])
def test_kept_states_stay_within_their_rooms(watched, engine, options, gpu, host):
    """A third batch is smaller than the others; room for n is room for some more of it."""
    decoder = Decoder(toy("llama", num_hidden_layers=4))
    expected = list(engine(decoder, decoder.blocks(), WINDOWS, 4, batch_size=2, **options))
    steps, store, batches = watched(engine, {GPUS[0]: gpu * STATE, HOST: host * PINNED}, **options)
    assert steps == [(s.block, s.scores) for s in expected]
    kept = [h for batch in batches for states in batch.kept.values() for h in states.values()]
    assert sorted(map(id, kept)) == sorted(map(id, store.held))
    for batch in batches:
        for states in batch.kept.values():
            for held in states.values():
                store.drop(held)
    assert store.held == [] and dict(store.rooms) == store.first
    if gpu + host >= 20:  # enough for the base model's states of all windows
        assert {device for device, room in store.first.items() if room} == store.most.keys()
    if gpu + host == 0:
        assert not kept


@pytest.mark.parametrize("gpu, host", [(0, 0), (3, 0), (0, 3), (10, 10), (10**6, 0)])
def test_streamed_states_are_held_within_their_rooms(watched, gpu, host):
    decoder = Decoder(toy("llama", num_hidden_layers=4))
    expected = list(exhaustive(decoder, decoder.blocks(), WINDOWS, 4, batch_size=2))
    steps, store, _ = watched(streamed, {GPUS[0]: gpu * STATE, HOST: host * PINNED})
    assert steps == [(s.block, s.scores) for s in expected]
    assert store.held == [] and dict(store.rooms) == store.first
    for device, room in store.first.items():  # a single candidate's and the base model's are held whatever the room
        assert store.most.get(device, 0) <= max(room, 5 * STATE if device == GPUS[0] else 0)


@pytest.mark.parametrize("engine", [cached, streamed])
def test_states_of_several_gpus_are_held_in_each_ones_room(watched, engine):
    decoder = Decoder(toy("llama", num_hidden_layers=4))
    expected = [(s.block, s.scores) for s in exhaustive(decoder, decoder.blocks(), WINDOWS, 4, batch_size=2)]
    both = {GPUS[0]: 20 * STATE, GPUS[1]: 20 * STATE, HOST: 20 * PINNED}
    steps, store, _ = watched(engine, both, GPUS)
    assert steps == expected
    assert all(0 < store.most[gpu] <= both[gpu] for gpu in GPUS)
    steps, store, _ = watched(engine, {GPUS[0]: 20 * STATE, HOST: 40 * PINNED}, GPUS)
    assert steps == expected
    assert GPUS[1] not in store.most and store.most[HOST] > 0, "one without a room spills"


def test_where_no_memory_can_be_pinned_nothing_is_kept(watched, monkeypatch):
    monkeypatch.setattr(OnGpu, "pins", False)
    decoder = Decoder(toy("llama", num_hidden_layers=4))
    expected = [(s.block, s.scores) for s in exhaustive(decoder, decoder.blocks(), WINDOWS, 4, batch_size=2)]
    for engine in (cached, streamed):
        steps, store, _ = watched(engine, {GPUS[0]: 0, HOST: 10**6 * PINNED})
        assert steps == expected
        assert store.held == []


def test_a_spilled_state_keeps_its_strides():
    h = torch.arange(24.0).view(2, 3, 4).transpose(0, 1).as_subclass(OnGpu)
    store = Store({GPUS[0]: 0, HOST: 128})
    held = store.put(h)
    assert held.stride() == h.stride() and torch.equal(plain(held), plain(h))
    assert store.rooms[HOST] == 0, "96 bytes take 128"
    assert store.put(h) is None
    store.drop(held)
    assert store.rooms[HOST] == 128


def test_rooms_are_shares_of_what_is_free_or_the_bytes_given(monkeypatch):
    free = {GPUS[0]: (1000, 400), GPUS[1]: (100, 400), HOST: (500, 0)}
    monkeypatch.setattr("lib.memory.free_bytes", free.get)
    assert rooms([HOST]) == {HOST: 300}
    assert rooms([HOST], 1000) == {HOST: 1000}
    assert rooms(GPUS) == {GPUS[0]: 600, GPUS[1]: 60, HOST: 100}
    assert rooms(GPUS, 900) == {GPUS[0]: 450, GPUS[1]: 60, HOST: 390}
    assert rooms(GPUS, 1000) == {GPUS[0]: 500, GPUS[1]: 60, HOST: 400}, "no more is pinned than is free"
    assert rooms(GPUS[:1], 0) == {GPUS[0]: 0, HOST: 0}


@pytest.fixture
def machine(tmp_path):
    """Return a function that writes /proc and /sys/fs/cgroup, and returns what is free there: (files) -> bytes."""

    def build(cgroup, **files):
        proc, groups = tmp_path / "proc", tmp_path / "cgroup"
        files = {proc / "self" / "cgroup": cgroup} | {groups / name: str(text) for name, text in files.items()}
        files[proc / "meminfo"] = "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n"
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return _free_on_host(proc, groups)

    return build


def test_without_a_limit_the_kernel_says_what_is_free(machine):
    assert machine("0::/\n") == 1000 * 1024
    assert machine("0::/user\n", **{"user/memory.max": "max", "user/memory.current": 5}) == 1000 * 1024


def test_the_tightest_group_of_version_2_counts(machine):
    files = {"slurm/memory.max": 9000, "slurm/memory.current": 2000, "slurm/memory.stat": "anon 1\ninactive_file 500"}
    files |= {"slurm/job/memory.max": "max", "slurm/job/memory.current": 1000}
    assert machine("0::/slurm/job/step\n", **files) == 7500
    files |= {"slurm/job/step/memory.max": 3000, "slurm/job/step/memory.current": 2900}
    assert machine("0::/slurm/job/step\n", **files) == 100
    files |= {"memory.max": 50, "memory.current": 60}  # a container's own group is the root of what it sees
    assert machine("0::/\n", **files) == 0


def test_the_tightest_group_of_version_1_counts(machine):
    files = {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 0}
    cgroup = "9:name=systemd:/slurm\n4:cpu,memory:/slurm/job\n0::/\n"
    assert machine(cgroup, **files) == 1000 * 1024
    files |= {"memory/slurm/memory.limit_in_bytes": 9000, "memory/slurm/memory.usage_in_bytes": 2000}
    files["memory/slurm/memory.stat"] = "inactive_file 1\ntotal_inactive_file 500\n"
    assert machine(cgroup, **files) == 7500
    # in a container the path is the one outside, and the group's files lie at the root
    files = {"memory/memory.limit_in_bytes": 800, "memory/memory.usage_in_bytes": 300}
    assert machine("4:memory:/docker/0123\n", **files) == 500
