"""How many tokens a model takes, and whether it needs a BOS token in front, by its family."""

import pytest
import torch
from families import TOYS, V, toy

from lib.families import needs_bos, positions

UNLIMITED = {"bloom", "bloom-post-norm"}  # ALiBi's slopes have no end


@pytest.mark.parametrize("name", TOYS)
def test_positions_are_found_in_every_family_that_has_a_limit(name):
    model = toy(name)
    most = positions(model.config)
    if name in UNLIMITED:
        assert most is None
        most = 300
    ids = torch.randint(V, (1, most), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert model(input_ids=ids, use_cache=False).logits.isfinite().all(), "as many as it says it takes"
    limit = {"max_position_embeddings", "n_positions", "max_seq_len"} & set(model.config.to_dict())
    assert bool(limit) == (positions(model.config) is not None)


def test_mpt_takes_no_more_than_it_says():
    model = toy("mpt")
    most = positions(model.config)
    assert most == 128
    with pytest.raises(RuntimeError), torch.inference_mode():
        model(input_ids=torch.zeros((1, most + 1), dtype=torch.long), use_cache=False)


def test_the_text_part_of_a_multimodal_configuration_counts():
    from transformers import Gemma3Config

    assert positions(Gemma3Config(text_config={"max_position_embeddings": 77})) == 77


@pytest.mark.parametrize("name", TOYS)
def test_gemma_needs_bos(name):
    assert needs_bos(toy(name)) == name.startswith("gemma")
