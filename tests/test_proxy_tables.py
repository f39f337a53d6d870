"""The networks that stand for the rows of recorded tables are those that were measured."""

import pytest

from bench.proxy_tables import authors_network, macro_network
from engine.networks.cost import count_cost
from engine.search.replay.published import authors_network as described

ENCODING = "1,16,4,1;6,32,1,2;6,64,4,2;6,128,4,2;6,184,2,1;6,320,1,2;6,440,2,1;0,536,2,0"


@pytest.mark.parametrize(
    ("choices", "macs", "params"),
    [((0,) * 8, 7713280, 387882), ((0,) * 7 + (2,), 20910592, 1219370), ((2,) * 8, 105660928, 2932586)],
)
def test_networks_of_nas_bench_macro_have_the_costs_that_it_records(
    choices: tuple[int, ...], macs: int, params: int
) -> None:
    assert count_cost(macro_network(choices, 10, 1.0), 32) == (macs, params)


def test_the_authors_networks_have_the_costs_of_their_encoding() -> None:
    network = authors_network((ENCODING,), (0,), 100, 1.0)
    assert count_cost(network, 32) == described(ENCODING)[1]
