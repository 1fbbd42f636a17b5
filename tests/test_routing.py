import pytest
from hypothesis import given
from hypothesis import strategies as st

from revnet import route_args
from revnet._routing import check_keywords, check_routes

ROUTE = {"mask": ((True, False), (False, True), (True, True), (False, False))}


def test_values_reach_exactly_the_branches_of_their_route():
    assert route_args(ROUTE, {"mask": 7}, 4) == [
        ({"mask": 7}, {}),
        ({}, {"mask": 7}),
        ({"mask": 7}, {"mask": 7}),
        ({}, {}),
    ]


def test_values_are_passed_on_and_not_copied():
    cache = {}
    (f_args, g_args), *_ = route_args({"cache": ((True, True),)}, {"cache": cache}, 1)
    assert f_args["cache"] is cache
    assert g_args["cache"] is cache


def test_each_branch_gets_its_own_dict():
    routed = route_args(ROUTE, {"mask": 7}, 4)
    assert len({id(branch) for block in routed for branch in block}) == 8


def test_none_is_routed_as_a_value():
    assert route_args({"mask": ((True, False),)}, {"mask": None}, 1) == [({"mask": None}, {})]


def test_a_keyword_without_route_reaches_no_branch():
    assert route_args({}, {"mask": 7}, 2) == [({}, {}), ({}, {})]


def test_a_route_without_its_keyword_adds_nothing():
    assert route_args(ROUTE, {}, 4) == [({}, {})] * 4


@given(st.data(), st.integers(0, 5))
def test_every_branch_agrees_with_its_own_flag(data, depth):
    pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=depth, max_size=depth)
    router = data.draw(st.dictionaries(st.sampled_from("abcd"), pairs))
    args = data.draw(st.dictionaries(st.sampled_from("abcdef"), st.integers()))
    routed = route_args(router, args, depth)
    assert len(routed) == depth
    for i in range(depth):
        for branch in (0, 1):
            assert routed[i][branch] == {
                k: v for k, v in args.items() if k in router and router[k][i][branch]
            }


@pytest.mark.parametrize("check", [check_routes, lambda route, depth: route_args(route, {}, depth)])
def test_a_route_of_the_wrong_length_names_key_length_and_depth(check):
    with pytest.raises(ValueError, match=r"args_route\['mask'\] has 4 pairs for 6 blocks.*\* 6"):
        check(ROUTE, 6)


@pytest.mark.parametrize("entry", [True, (True,), (True, False, True)])
def test_an_entry_that_is_no_pair_is_named(entry):
    with pytest.raises(ValueError, match=r"args_route\['mask'\]\[1\] is "):
        check_routes({"mask": ((True, False), entry)}, 2)


def test_routes_of_the_right_length_pass():
    check_routes(ROUTE, 4)
    check_routes({}, 3)
    check_routes({"mask": [[1, 0]]}, 1)


def test_a_lost_keyword_raises_and_lists_the_routes():
    with pytest.raises(TypeError, match=r"no route for keyword 'msak' \(routes: 'mask', 'cache'\)"):
        check_keywords({"mask": ((True, True),), "cache": ((True, True),)}, {"msak": 1, "mask": 2})
    with pytest.raises(TypeError, match=r"'mask' \(routes: none\)"):
        check_keywords({}, {"mask": 1})


def test_a_lost_keyword_that_is_none_passes():
    check_keywords({}, {"mask": None})
    check_keywords(ROUTE, {"mask": 1})
