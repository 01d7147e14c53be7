"""Few-shot tasks and the data they are drawn from: who is in them, and how often."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.datasets import ClassData
from metaopt.few_shot import Episodes, HostEpisodes, Task


NUM_CLASSES, MOST = 7, 6
WAYS, SHOTS, QUERIES = 3, 2, 1
# Three of the classes have less than a full row, and one of them just enough.
COUNTS = np.array([6, 3, 6, 4, 6, 5, 6])
PADDING = -1


def tagged(counts: Any = None) -> ClassData:
    """Examples that are numbers: that of the class times ten, plus that of the example."""
    x = 10 * np.arange(NUM_CLASSES)[:, None] + np.arange(MOST)
    if counts is not None:
        x = np.where(np.arange(MOST) < np.asarray(counts)[:, None], x, PADDING)
    return ClassData(x, counts)


DEVICE, HOST = "device", "host"


def drawn(where: str, data: ClassData, number: int, *, seed: int = 0) -> Task:
    """So many tasks, with a leading axis, as NumPy arrays."""
    if where == DEVICE:
        episodes = Episodes(data, WAYS, SHOTS, QUERIES, num_tasks=number)
        batch = eqx.filter_jit(episodes)(jax.random.key(seed))
        return jax.tree.map(np.asarray, batch)
    return HostEpisodes(data, WAYS, SHOTS, QUERIES, num_tasks=number, seed=seed).batch(0)


each_place = pytest.mark.parametrize("where", [DEVICE, HOST])
each_counts = pytest.mark.parametrize("counts", [None, COUNTS], ids=["even", "uneven"])


def assert_equal_tasks(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# What a task is


@each_place
@each_counts
def test_tasks_are_sound(where, counts):
    tasks = drawn(where, tagged(counts), 200)
    (support, support_labels), (query, query_labels) = tasks.support, tasks.query
    assert support.shape == support_labels.shape == (200, WAYS * SHOTS)
    assert query.shape == query_labels.shape == (200, WAYS * QUERIES)
    # Class after class.
    np.testing.assert_array_equal(support_labels, np.tile([0, 0, 1, 1, 2, 2], (200, 1)))
    np.testing.assert_array_equal(query_labels, np.tile([0, 1, 2], (200, 1)))
    # No example twice, neither in support nor query nor in both of them.
    together = np.sort(np.concatenate([support, query], 1), 1)
    assert np.all(np.diff(together) > 0)
    # Never what fills up the rows of classes with few examples.
    assert together.min() > PADDING
    for s, q in zip(support // 10, query // 10):
        np.testing.assert_array_equal(s, np.repeat(q, SHOTS))
        assert len(set(q)) == WAYS


@each_place
@each_counts
def test_all_that_can_be_drawn_is(where, counts):
    tasks = drawn(where, tagged(counts), 400)
    every = tagged(counts).x
    # An example is the query of a task with a probability of 3/7 * 1/6 or more, and of no
    # one in 400 with one of 1e-13; a shot it is more often.
    for x in (tasks.support[0], tasks.query[0]):
        np.testing.assert_array_equal(np.unique(x), np.unique(every[every > PADDING]))


@each_place
def test_a_task_of_all_there_is(where):
    data = tagged()[:WAYS]
    arguments = (data, WAYS, 4, 2)
    if where == DEVICE:
        task = Episodes(*arguments).draw(jax.random.key(0))
        parts = (task.support[0], task.query[0])
    else:
        task = HostEpisodes(*arguments).batch(0)
        parts = (task.support[0][0], task.query[0][0])
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), data.x.reshape(-1))


def assert_frequency(counts: Any, trials: int, probability: float) -> None:
    # Five standard deviations of a binomial: one of a million draws is further off.
    deviation = np.sqrt(trials * probability * (1 - probability))
    np.testing.assert_allclose(counts, trials * probability, atol=5 * deviation)


@each_place
def test_all_are_drawn_equally_often(where):
    number = 1500
    tasks = drawn(where, tagged(COUNTS), number)
    classes = tasks.query[0] // 10

    # Each class under each label.
    for label in range(WAYS):
        count = np.bincount(classes[:, label], minlength=NUM_CLASSES)
        assert_frequency(count, number, 1 / NUM_CLASSES)
    # Each pair of classes under the first two, as if the second knew nothing of the first.
    pairs = np.bincount(classes[:, 0] * NUM_CLASSES + classes[:, 1], minlength=49)
    off_diagonal = pairs.reshape(7, 7)[~np.eye(NUM_CLASSES, dtype=bool)]
    assert_frequency(off_diagonal, number, 1 / (NUM_CLASSES * (NUM_CLASSES - 1)))
    # Each example of a class as its query, and as its first shot.
    for x in (tasks.query[0], tasks.support[0][:, ::SHOTS]):
        for number_of_class, size in enumerate(COUNTS):
            of_class = x[x // 10 == number_of_class] % 10
            assert_frequency(np.bincount(of_class), len(of_class), 1 / size)


@each_place
def test_which_examples_are_drawn_is_not_the_same_in_each_class(where):
    number = 1500
    first, second, _ = drawn(where, tagged(), number).query[0].T % 10
    pairs = np.bincount(first * MOST + second, minlength=MOST**2)
    assert_frequency(pairs, number, 1 / MOST**2)


def test_device_and_host_give_the_same_kind_of_task():
    device, host = drawn(DEVICE, tagged(), 4), drawn(HOST, tagged(), 4)
    for a, b in zip(jax.tree.leaves(device), jax.tree.leaves(host), strict=True):
        assert a.shape == b.shape and a.dtype.kind == b.dtype.kind == "i"


# Preparation


def images(dtype=np.uint8) -> ClassData:
    random = np.random.default_rng(0)
    return ClassData(random.integers(0, 256, (4, 3, 5, 5)).astype(dtype))


def draw_one(where: str, data: ClassData, **options: Any) -> Task:
    if where == DEVICE:
        return Episodes(data, 2, 1, 2, **options).draw(jax.random.key(1))
    task = HostEpisodes(data, 2, 1, 2, **options).batch(1)
    return jax.tree.map(lambda a: a[0], task)


@each_place
def test_bytes_become_numbers_from_0_to_1(where):
    data = images()
    task = draw_one(where, data)
    raw = draw_one(where, data, prepare=lambda x: x)
    assert task.support[0].shape == (2, 5, 5) and task.query[0].shape == (4, 5, 5)
    for part, unprepared in ((task.support, raw.support), (task.query, raw.query)):
        assert part[0].dtype == np.float32 and unprepared[0].dtype == np.uint8
        expected = np.asarray(unprepared[0], np.float64) / 255
        # Rounded to float32.
        np.testing.assert_allclose(part[0], expected, rtol=2e-7)
    assert np.max(task.query[0]) > 0.9
    # Each of them is one of the images.
    known = {image.tobytes() for image in data.x.reshape(-1, 5, 5)}
    assert all(np.asarray(image).tobytes() in known for image in raw.query[0])


@each_place
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_other_numbers_stay(where, dtype):
    task = draw_one(where, images(dtype))
    assert task.query[0].dtype == dtype and np.max(task.query[0]) > 200


@each_place
def test_prepare_sees_all_examples_of_a_part(where):
    shapes = []

    def prepare(x):
        shapes.append(x.shape)
        return x[..., None] + 0.5

    task = draw_one(where, images(), prepare=prepare)
    assert shapes == [(2, 5, 5), (4, 5, 5)]
    assert task.query[0].shape == (4, 5, 5, 1)
    np.testing.assert_array_equal(task.support[0] % 1, 0.5)


# Randomness and transformations: on the device


def test_a_key_is_a_task():
    episodes = Episodes(tagged(COUNTS), WAYS, SHOTS, QUERIES)
    key = jax.random.key(3)
    task = episodes.draw(key)
    assert_equal_tasks(episodes.draw(key), task)
    assert_equal_tasks(Episodes(tagged(COUNTS), WAYS, SHOTS, QUERIES).draw(key), task)
    assert_equal_tasks(eqx.filter_jit(episodes.draw)(key), task)
    other = episodes.draw(jax.random.key(4))
    assert not np.array_equal(other.support[0], task.support[0])


def test_draws_under_vmap():
    episodes = Episodes(tagged(COUNTS), WAYS, SHOTS, QUERIES)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(episodes.draw)(keys)
    for place, key in enumerate(keys):
        one = jax.tree.map(lambda a: a[place], together)
        assert_equal_tasks(one, episodes.draw(key))


def test_episodes_are_a_pytree():
    episodes = Episodes(tagged(COUNTS), WAYS, SHOTS, QUERIES, num_tasks=2)
    count = 0

    @jax.jit
    def batch(episodes, key):
        nonlocal count
        count += 1
        return episodes(key)

    key = jax.random.key(0)
    assert_equal_tasks(batch(episodes, key), episodes(key))
    # Other data of the same shape are no reason to compile again.
    shifted = ClassData(tagged().x + 100, COUNTS)
    other = Episodes(shifted, WAYS, SHOTS, QUERIES, num_tasks=2)
    assert batch(other, key).support[0].min() >= 100
    assert count == 1


def test_numbers_that_do_not_fit_are_refused():
    wide = ClassData(tagged().x.astype(np.int64) + 2**40)
    with jax.enable_x64(False), pytest.raises(ValueError, match="int32 cannot hold"):
        Episodes(wide, WAYS, SHOTS, QUERIES)


def test_seeds_of_the_host_are_all_different():
    # Those above 32 bits were once split in two.
    one, other = host(seed=2**32 + 5).batch(0), host(seed=5).batch(1)
    assert not np.array_equal(one.support[0], other.support[0])


def test_tasks_of_a_batch_and_of_others_are_different():
    episodes = Episodes(tagged(), WAYS, SHOTS, QUERIES, num_tasks=4)
    batches = [episodes(key) for key in jax.random.split(jax.random.key(0), 5)]
    for batch in batches:
        assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {4}
        assert len({bytes(np.asarray(task)) for task in batch.support[0]}) == 4
    for one, other in itertools.combinations(batches, 2):
        assert not np.array_equal(one.support[0], other.support[0])


# Randomness: on the host


def host(**options: Any) -> HostEpisodes:
    return HostEpisodes(tagged(COUNTS), WAYS, SHOTS, QUERIES, num_tasks=2, **options)


def test_host_batches_depend_on_seed_and_number_alone():
    first = host(seed=5)
    batches = [first.batch(index) for index in range(3)]
    # Another process, that asks for them in another order.
    again = host(seed=5)
    for index in (2, 0, 1, 0):
        assert_equal_tasks(again.batch(index), batches[index])
    for one, other in itertools.combinations(batches, 2):
        assert not np.array_equal(one.support[0], other.support[0])
    assert not np.array_equal(host(seed=6).batch(0).support[0], batches[0].support[0])
    assert not np.array_equal(*batches[0].support[0])


def test_host_batches_go_on():
    episodes = host()
    whole = list(itertools.islice(iter(episodes), 5))
    resumed = list(itertools.islice(episodes.starting_at(2), 3))
    for one, other in zip(whole[2:], resumed, strict=True):
        assert_equal_tasks(one, other)
    # A second loop starts anew.
    assert_equal_tasks(next(iter(episodes)), whole[0])


def test_host_tasks_from_a_memory_map(tmp_path):
    data = images()
    np.save(tmp_path / "x.npy", data.x)
    mapped = ClassData(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert isinstance(mapped.x.base, np.memmap)
    assert_equal_tasks(draw_one(HOST, mapped), draw_one(HOST, data))


# Refusals


@pytest.mark.parametrize("kind", [Episodes, HostEpisodes])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_ways": 8}, "`num_ways=8` classes cannot be drawn from 7 classes of toy"),
        (
            {"num_shots": 3},
            r"`num_shots` \+ `num_queries` is 4, and class 1 of toy has 3 examples.*"
            r"`data\[data.counts >= 4\]`",
        ),
        ({"num_queries": 9}, r"is 11, and class 1 of toy has 3 examples"),
        ({"num_ways": 0}, "`num_ways` must be at least 1; got 0"),
        ({"num_shots": 0}, "`num_shots` must be at least 1; got 0"),
        ({"num_queries": -1}, "`num_queries` must be at least 1; got -1"),
        ({"num_tasks": 0}, "`num_tasks` must be at least 1; got 0"),
        ({"num_ways": True}, "`num_ways` must be an int; got True"),
        ({"num_shots": 1.0}, "`num_shots` must be an int; got 1.0"),
        ({"num_queries": "1"}, "`num_queries` must be an int; got '1'"),
        ({"num_tasks": None}, "`num_tasks` must be an int; got None"),
        ({"data": COUNTS}, r"must be a `metaopt.datasets.ClassData`; got ndarray.*from_l"),
        ({"data": None}, "must be a `metaopt.datasets.ClassData`; got NoneType"),
    ],
    ids=str,
)
def test_episodes_refuse(kind, change, message):
    data = ClassData(tagged().x, COUNTS, "toy")
    sizes = {"num_ways": WAYS, "num_shots": SHOTS, "num_queries": QUERIES, "num_tasks": 1}
    arguments = {"data": data} | sizes
    assert kind(**arguments).num_ways == WAYS
    with pytest.raises(ValueError, match=message):
        kind(**(arguments | change))


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_host_episodes_refuse_a_seed(seed):
    with pytest.raises(ValueError, match="`seed` must be"):
        host(seed=seed)


def test_what_is_proposed_for_small_classes_works():
    data = tagged(COUNTS)
    enough = data[data.counts >= 5]
    assert enough.num_classes == 5
    assert Episodes(enough, 5, 4, 1).draw(jax.random.key(0)).query[0].shape == (5,)


# Data


def test_from_labels():
    # In no order, and without any example of 1, 2 and 4.
    y = np.array([5, 0, 3, 0, 5, 0], np.int8)
    x = np.arange(12.0).reshape(6, 2)
    data = ClassData.from_labels(x, y, "toy")
    assert data.num_classes == 3 and data.name == "toy" and data.x.dtype == x.dtype
    np.testing.assert_array_equal(data.counts, [3, 1, 2])
    for place, label in enumerate([0, 3, 5]):
        np.testing.assert_array_equal(data.x[place, : data.counts[place]], x[y == label])
    tasks = HostEpisodes(data[data.counts >= 2], 2, 1, 1, num_tasks=50).batch(0)
    drawn_rows = {tuple(row) for row in tasks.support[0].reshape(-1, 2)}
    assert drawn_rows == {tuple(row) for row in x[y != 3]}


def test_from_labels_takes_lists_and_jax_arrays():
    x, y = [[1], [2], [3]], [1, 0, 1]
    for data in (
        ClassData.from_labels(x, y),
        ClassData.from_labels(jnp.asarray(x), jnp.asarray(y)),
    ):
        assert isinstance(data.x, np.ndarray) and isinstance(data.counts, np.ndarray)
        np.testing.assert_array_equal(data.x[0, :1], [[2]])
        np.testing.assert_array_equal(data.x[1], [[1], [3]])


def test_data_selects():
    data = ClassData(tagged().x, COUNTS, "toy")
    for classes in (slice(2, 5), [4, 0], np.array([3]), data.counts > 5):
        part = data[classes]
        np.testing.assert_array_equal(part.x, data.x[classes])
        np.testing.assert_array_equal(part.counts, COUNTS[classes])
        assert part.name == "toy" and part.num_classes == len(part.x)


def test_data_is_a_pytree():
    data = tagged(COUNTS)
    assert len(jax.tree.leaves(data)) == 2
    np.testing.assert_array_equal(tagged().counts, [MOST] * NUM_CLASSES)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 1, 4, 4)], ids=["grey", "channels"])
def test_rotations_are_those_of_numpy(shape):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    data = ClassData(x, [3, 2], "toy").with_rotations()
    assert data.num_classes == 8 and data.name == "toy"
    np.testing.assert_array_equal(data.counts, [3, 2] * 4)
    for turns in range(4):
        for place, rows in enumerate(x):
            for example, image in enumerate(rows):
                # Image by image, whose last two axes are its first where it is grey.
                axes = (-2, -1)
                expected = np.rot90(image, turns, axes)
                found = data.x[turns * 2 + place, example]
                np.testing.assert_array_equal(found, expected)
    assert len(np.unique(data.x.reshape(8, -1), axis=0)) == 8


def test_rotations_about_other_axes():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 5))
    data = ClassData(x).with_rotations((-3, -2))
    np.testing.assert_array_equal(data.x[2, 1], np.rot90(x[0, 1]))


def test_a_rotation_is_a_class_of_its_own():
    # Images with one bright corner: which it is says how they were turned.
    x = np.zeros((1, 3, 2, 2), np.uint8)
    x[..., 0, 0] = 255
    data = ClassData(x).with_rotations()
    task = Episodes(data, 4, 1, 2).draw(jax.random.key(0))
    corner = lambda part: np.argmax(np.asarray(part[0]).reshape(-1, 4), 1)
    np.testing.assert_array_equal(corner(task.query), np.repeat(corner(task.support), 2))
    assert sorted(corner(task.support)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ClassData(np.zeros(3)),
            r"axis of classes and one of ex.*got shape \(3,\)",
        ),
        (lambda: ClassData(3.0), r"axis of classes and one of examples.*got shape \(\)"),
        (lambda: ClassData(np.zeros((3, 0))), r"hold something; got shape \(3, 0\)"),
        (lambda: ClassData(np.zeros((0, 3))), r"hold something; got shape \(0, 3\)"),
        (
            lambda: ClassData(np.zeros((2, 3)), [3]),
            r"`counts` must be one whole number for each of the 2.*shape \(1,\)",
        ),
        (lambda: ClassData(np.zeros((2, 3)), 3), r"each of the 2 classes; got shape \(\)"),
        (lambda: ClassData(np.zeros((2, 3)), [3, 1.0]), "`counts`.*and dtype float64"),
        (lambda: ClassData(np.zeros((2, 3)), [True, True]), "`counts`.*and dtype bool"),
        (
            lambda: ClassData(np.zeros((2, 3)), [0, 3]),
            "`counts` must lie between 1 and 3.*got values from 0 to 3",
        ),
        (lambda: ClassData(np.zeros((2, 3)), [4, 3]), "1 and 3.*got values from 3 to 4"),
        (lambda: ClassData(np.zeros((2, 3)), [-1, 3]), "got values from -1 to 3"),
        # Lists that are no array once came with an error of NumPy.
        (
            lambda: ClassData([[1, 2], [3]]),
            r"`x` must be one array; got a list of 2 parts of shape \(2,\), \(1,\)\. "
            r"Hand over rows of one length.*from_labels.*`counts`",
        ),
        (
            lambda: ClassData((*map(np.zeros, [(2, 3), (2, 4), (2, 3)]),)),
            r"got a tuple of 3 parts of shape \(2, 3\), \(2, 4\)\. ",
        ),
        (lambda: ClassData([[[1], [2, 3]], [4, 5]]), r"of shape \(2, \?\), \(2,\)\. "),
        (
            lambda: ClassData([np.zeros(n) for n in range(1, 7)]),
            r"of 6 parts of shape \(1,\), \(2,\), \(3,\), \(4,\), \.\.\.\. Hand over",
        ),
        (
            lambda: ClassData(np.zeros((2, 3)), [[1], [2, 3]]),
            r"`counts` must be one array; got a list.*Hand over one whole number",
        ),
        (
            lambda: ClassData.from_labels([[1, 2], [3]], [0, 1]),
            r"`x` must be one array; got a list.*Hand over examples of one shape",
        ),
        (
            lambda: ClassData.from_labels(np.zeros(2), [[0], [1, 2]]),
            "`y` must be one array; got a list.*Hand over one whole number",
        ),
        (
            lambda: ClassData.from_labels(3, [0, 1]),
            r"`x` must have an axis of examples; got array\(3\)",
        ),
        (lambda: ClassData([[1.0, np.nan]]), "`x` holds infinite or NaN values"),
        (lambda: ClassData([[1.0, np.inf]]), "`x` holds infinite or NaN values"),
        (lambda: ClassData([[1.0, 1j * np.inf]]), "`x` holds infinite or NaN values"),
        (lambda: tagged()[:0], r"hold something; got shape \(0, 6\)"),
        (
            lambda: ClassData.from_labels(np.zeros((3, 2)), [0, 1]),
            r"`y` must hold one whole number for each of the 3 examples.*shape \(2,\)",
        ),
        (
            lambda: ClassData.from_labels(np.zeros((3, 2)), [[0], [1], [1]]),
            r"for each of the 3 examples in `x`; got shape \(3, 1\)",
        ),
        (
            lambda: ClassData.from_labels(np.zeros(2), [0.0, 1.0]),
            "one whole number for each.*dtype float64",
        ),
        (lambda: ClassData.from_labels(np.zeros(2), ["a", "b"]), "dtype <U1"),
        (lambda: ClassData.from_labels(np.zeros(2), [True, False]), "dtype bool"),
        (
            lambda: ClassData.from_labels(np.zeros(2), [0, -3]),
            "Labels must be 0 or more, and some; got label -3",
        ),
        (
            lambda: ClassData.from_labels(np.zeros(0), np.zeros(0, int)),
            "Labels must be 0 or more, and some; got no label at all",
        ),
        (
            lambda: ClassData.from_labels([np.nan, 1.0], [0, 1]),
            "`x` holds infinite or NaN values",
        ),
        (
            lambda: ClassData(np.zeros((2, 3, 4))).with_rotations(),
            r"Only images can be turned.*its shape is \(2, 3, 4\)",
        ),
        (
            lambda: ClassData(np.zeros((2, 3, 4, 5))).with_rotations(),
            r"must be square; got shape \(4, 5\)",
        ),
    ],
)
def test_data_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
