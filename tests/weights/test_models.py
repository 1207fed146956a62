"""What the fifteen classes promise beyond equality with transformers: tables, switches, errors, generation."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from torch import Tensor

import data2vec_train as ours
from data2vec_train.errors import ConfigError, WeightMismatch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TABLES = json.loads(gzip.decompress((Path(__file__).parents[1] / "golden" / "hf_state.json.gz").read_bytes()))
RELEASED = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
SHARED_BIAS = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
PER_LAYER = {"use_relative_position_bias": True}
OPTIONS = {  # what the tables were made with, besides the defaults
    "audio_base.Model.adapter": {"add_adapter": True},
    "audio_base.Model.adapter_proj512": {"add_adapter": True, "output_hidden_size": 512},
    "audio_base.ForSequenceClassification.weighted_sum": {"use_weighted_layer_sum": True},
    "audio_large.Model": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "text_base.Model.decoder_cross_attention": {"is_decoder": True, "add_cross_attention": True},
    "vision_base.Model.pretrain_style": SHARED_BIAS,
    "vision_base.Model.pretrain_style_mask_token": SHARED_BIAS | {"use_mask_token": True},
    "vision_base.Model.ft_style": PER_LAYER,
    "vision_base.Model.abs_pos_both_rel": PER_LAYER
    | {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "vision_base.ForImageClassification.ft1k": PER_LAYER | {"num_labels": 1000},
    "vision_base.ForImageClassification.cls_token_pool": PER_LAYER | {"use_mean_pooling": False, "num_labels": 1000},
    "vision_base.ForSemanticSegmentation": PER_LAYER | {"num_labels": 150},
    "vision_large.Model.pretrain_style": SHARED_BIAS
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


@pytest.mark.parametrize("table", TABLES)
def test_names_and_shapes_are_those_of_transformers(table):
    stem, kind = table.split(".")[:2]
    family = stem.split("_")[0].title()
    options = (RELEASED if stem == "text_base" else {}) | OPTIONS.get(table, {})
    config = getattr(ours, f"Data2Vec{family}Config")(**options)
    with torch.device("meta"):
        model = getattr(ours, f"Data2Vec{family}{kind}")(config)
    own = model.state_dict()
    found = {}
    for theirs, name in model.names().items():
        name, _, part = name.partition("#")
        shape = list(own[name].shape)
        found[theirs] = [shape[0] // 3, *shape[1:]] if part else shape
    expected = {name: row["shape"] for name, row in TABLES[table].items() if row["kind"] != "nonpersistent_buffer"}
    assert found == expected
    aliases = {name: row["alias_of"] for name, row in TABLES[table].items() if row["alias_of"]}
    assert model.aliases() == aliases
    # One name for each tensor of ours, and none is forgotten.
    values = [name for name in model.names().values()]
    assert len(set(values)) == len(values)
    assert {name.partition("#")[0] for name in values} == set(own)


# ---------------------------------------------------------------------------------------------------------------------

SMALL = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
AUDIO = SMALL | {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embedding_groups": 4,
    "conv_pos_kernel_size": 5,
    "num_conv_pos_embeddings": 3,
    "tdnn_dim": [16, 16, 24],
    "tdnn_kernel": [3, 3, 1],
    "tdnn_dilation": [1, 2, 1],
    "xvector_output_dim": 10,
    "layerdrop": 0.0,
    "num_labels": 3,
}
TEXT = SMALL | {"vocab_size": 60, "max_position_embeddings": 40, "layer_norm_eps": 1e-5}
VISION = SMALL | {"image_size": 32, "patch_size": 8, "use_shared_relative_position_bias": True}


def noisy(model, *, size: float = 0.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * size)
    return model.eval()


def audio(name: str = "Data2VecAudioModel", **changes):
    torch.manual_seed(0)
    return noisy(getattr(ours, name)(ours.Data2VecAudioConfig(**AUDIO | changes)))


def text(name: str = "Data2VecTextModel", *, noise: float = 0.2, **changes):
    torch.manual_seed(0)
    return noisy(getattr(ours, name)(ours.Data2VecTextConfig(**TEXT | changes)), size=noise)


def writer(**changes):
    """A decoder with so much noise, and none that is the same for every token, that it does not repeat itself."""
    model = text("Data2VecTextForCausalLM", is_decoder=True, noise=0.7, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    return model


def vision(name: str = "Data2VecVisionModel", **changes):
    torch.manual_seed(0)
    return noisy(getattr(ours, name)(ours.Data2VecVisionConfig(**VISION | changes)))


def as_theirs(model, folder, **options):
    model.save_pretrained(folder)
    return getattr(transformers, type(model).__name__).from_pretrained(folder, **options).eval()


def padded_waveforms() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    mask = torch.arange(600) < torch.tensor([600, 431])[:, None]
    return torch.randn(2, 600) * mask, mask.long()


class TestAudio:
    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_padding_changes_nothing_but_in_compatibility_mode(self, backend):
        waves, mask = padded_waveforms()
        for compatible in (False, True):
            model = audio(hf_compat=compatible)
            model.set_attn_implementation(backend)
            alone = model(waves[1:, :431]).last_hidden_state
            together = model(waves, mask).last_hidden_state[1:, : alone.shape[1]]
            difference = float((alone - together).detach().abs().max())
            assert (difference > 1e-2) if compatible else (difference < 1e-5), difference

    def test_given_frames_are_hidden_in_evaluation_too(self, tmp_path):
        model = audio(hf_compat=True)
        reference = as_theirs(model, tmp_path)
        waves, mask = padded_waveforms()
        hidden = torch.rand(2, 29) < 0.3
        expected = reference(waves, mask, mask_time_indices=hidden).last_hidden_state
        found = model(waves, mask, mask_time_indices=hidden).last_hidden_state
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        assert float((found - model(waves, mask).last_hidden_state).detach().abs().max()) > 0.1

    def test_spans_are_drawn_as_transformers_draws_them(self, tmp_path):
        quiet = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}
        model = audio(
            hf_compat=True,
            mask_time_prob=0.6,
            mask_time_length=4,
            mask_feature_prob=0.3,
            mask_feature_length=3,
            **quiet,
        )
        reference = as_theirs(model, tmp_path)
        waves, mask = padded_waveforms()
        for seed in range(20):
            np.random.seed(seed)
            expected = reference.train()(waves, mask).last_hidden_state
            np.random.seed(seed)
            found = model.train()(waves, mask).last_hidden_state
            torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)

    def test_layer_drop_leaves_the_number_of_hidden_states_alone(self):
        waves, _ = padded_waveforms()
        model = audio("Data2VecAudioForSequenceClassification", layerdrop=0.5, use_weighted_layer_sum=True).train()
        for seed in range(12):
            torch.manual_seed(seed)
            output = model(waves, output_hidden_states=True)
            assert len(output.hidden_states) == 4
        compatible = audio(layerdrop=0.5, hf_compat=True).train()
        lengths = set()
        for seed in range(12):
            torch.manual_seed(seed)
            lengths.add(len(compatible(waves, output_hidden_states=True).hidden_states))
        assert len(lengths) > 1

    def test_an_adapter_gives_the_same_length_in_training(self):
        waves, mask = padded_waveforms()
        model = audio(
            "Data2VecAudioForCTC", add_adapter=True, num_adapter_layers=2, layerdrop=0.9, vocab_size=9
        ).train()
        lengths = {model(waves, mask).logits.shape[1] for _ in range(8)}
        assert lengths == {8}
        assert int(model._get_feat_extract_output_lengths(600)) == 8

    @pytest.mark.parametrize("kernel", [3, 4, 5])
    def test_lengths_behind_an_adapter_are_right(self, kernel):
        model = audio(add_adapter=True, num_adapter_layers=2, adapter_kernel_size=kernel)
        waves, _ = padded_waveforms()
        assert model(waves).last_hidden_state.shape[1] == model._get_feat_extract_output_lengths(600)

    def test_speaker_vectors_do_not_depend_on_padding(self):
        model = audio("Data2VecAudioForXVector")
        waves, mask = padded_waveforms()
        alone = model(waves[1:, :431]).embeddings
        together = model(waves, mask).embeddings[1:]
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
        compatible = audio("Data2VecAudioForXVector", hf_compat=True)
        assert float((compatible(waves, mask).embeddings[1:] - alone).abs().max()) > 1e-2

    def test_padded_frames_do_not_count_in_the_loss_and_classes_may_be_numbers(self):
        model = audio("Data2VecAudioForAudioFrameClassification")
        waves, mask = padded_waveforms()
        labels = torch.randint(0, 3, (2, 29))
        loss = model(waves, mask, labels=labels).loss
        onehot = torch.nn.functional.one_hot(labels, 3).float()
        torch.testing.assert_close(model(waves, mask, labels=onehot).loss, loss)
        labels[1, 25:] = (labels[1, 25:] + 1) % 3  # behind the end of the second recording
        torch.testing.assert_close(model(waves, mask, labels=labels).loss, loss)

    @pytest.mark.parametrize(
        ("num_labels", "labels", "expected"),
        [
            (1, torch.tensor([0.5, -1.0]), torch.nn.functional.mse_loss),
            (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), torch.nn.functional.binary_cross_entropy_with_logits),
            (3, torch.tensor([2, 0]), torch.nn.functional.cross_entropy),
        ],
    )
    def test_recordings_can_have_numbers_and_several_labels(self, num_labels, labels, expected):
        model = audio("Data2VecAudioForSequenceClassification", num_labels=num_labels)
        waves, _ = padded_waveforms()
        output = model(waves, labels=labels)
        torch.testing.assert_close(output.loss, expected(output.logits.squeeze(), labels))

    def test_labels_outside_of_the_vocabulary_are_refused(self):
        model = audio("Data2VecAudioForCTC", vocab_size=9)
        with pytest.raises(ValueError, match="label 9 is not in the vocabulary of 9 symbols"):
            model(torch.randn(1, 600), labels=torch.tensor([[9]]))

    def test_freezing_the_convolutions(self):
        model = audio("Data2VecAudioForCTC", vocab_size=9).train()
        model.freeze_feature_encoder()
        model(torch.randn(1, 600), labels=torch.tensor([[3]])).loss.backward()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        frozen = {name for name, _ in model.named_parameters() if ".features." in name}
        assert frozen
        assert frozen <= without <= frozen | {"data2vec_audio.encoder.mask_token"}

    def test_a_mask_token_survives_a_config_that_has_no_use_for_it(self, tmp_path):
        model = audio()
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"mask_time_prob": 0.0}
        (tmp_path / "config.json").write_text(json.dumps(config))
        again = ours.Data2VecAudioModel.from_pretrained(tmp_path)
        assert torch.equal(again.encoder.mask_token, model.encoder.mask_token)
        assert again.config.mask_time_prob == 0.0

    def test_without_a_mask_token_nothing_can_be_hidden(self):
        model = audio(mask_time_prob=0.0)
        with pytest.raises(ConfigError, match="no mask token"):
            model(torch.randn(1, 600), mask_time_indices=torch.ones(1, 29, dtype=torch.bool))


class TestText:
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def test_a_cache_changes_nothing(self):
        model = text("Data2VecTextForCausalLM", is_decoder=True)
        whole = model(self.ids[:1]).logits
        cache, pieces = None, []
        for piece in self.ids[:1].split([2, 1, 2], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        assert cache.get_seq_length() == 5
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-6, rtol=1e-5)

    def test_a_cache_with_encoder_states(self):
        model = text(is_decoder=True, add_cross_attention=True)
        states = {"encoder_hidden_states": torch.randn(1, 4, 32)}
        whole = model(self.ids[:1], **states).last_hidden_state
        first = model(self.ids[:1, :3], **states, use_cache=True)
        second = model(self.ids[:1, 3:], **states, past_key_values=first.past_key_values)
        torch.testing.assert_close(second.last_hidden_state, whole[:, 3:], atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("compatible", [False, True])
    @pytest.mark.parametrize("left", [0, 3])
    def test_greedy_text_follows_the_forward_pass_or_transformers(self, compatible, left, tmp_path):
        model = writer(hf_compat=compatible)
        prompt = torch.cat([torch.ones(1, left, dtype=torch.int64), self.ids[:1]], dim=1)
        mask = (prompt != 1).long()
        written = model.generate(prompt, mask, max_new_tokens=8, eos_token_id=-1)
        assert torch.equal(written, model.generate(prompt, mask, max_new_tokens=8, eos_token_id=-1, use_cache=False))
        if compatible:
            reference = as_theirs(model, tmp_path)
            expected = reference.generate(
                prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1
            )
        else:
            expected = self.ids[:1]
            for _ in range(8):
                expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
            written = written[:, left:]
        assert torch.equal(written, expected)

    def test_the_two_modes_write_different_texts(self):
        texts = [
            writer(hf_compat=compat).generate(self.ids[:1], max_new_tokens=12, eos_token_id=-1)
            for compat in (False, True)
        ]
        assert not torch.equal(*texts)
        assert len(set(texts[0][0].tolist())) > 6

    def test_sampling(self):
        model = writer()
        settings = {"max_new_tokens": 6, "eos_token_id": -1}

        def draw(seed: int, **more) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return model.generate(self.ids[:1], do_sample=True, generator=generator, **settings, **more)

        greedy = model.generate(self.ids[:1], **settings)
        assert torch.equal(draw(0), draw(0))
        assert len({str(draw(seed).tolist()) for seed in range(8)}) > 1
        for certain in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
            assert torch.equal(draw(3, **certain), greedy), certain

    def test_a_row_that_ended_goes_on_with_padding(self):
        model = writer()
        end = int(model.generate(self.ids[:1], max_new_tokens=1, eos_token_id=-1)[0, -1])
        prompts = torch.cat([self.ids[:1], self.ids[:1].flip(1)])
        written = model.generate(prompts, max_new_tokens=5, eos_token_id=end)
        assert written[0, 5] == end
        assert (written[0, 6:] == 1).all()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"temperature": 0.0}, "temperature=0.0: expected above 0"),
            ({"top_k": 0}, "top_k=0"),
            ({"top_p": 1.5}, "top_p=1.5"),
            ({"max_new_tokens": 3, "max_length": 9}, "exclude each other"),
            ({"max_length": 5}, "leaves no room"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            writer().generate(self.ids[:1], **settings)

    def test_recomputing_activations_of_a_decoder(self):
        gradients = []
        for recompute in (False, True):
            model = writer().train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
            if recompute:
                model.gradient_checkpointing_enable()
            model(self.ids[:1]).logits.square().sum().backward()
            gradients.append(model.lm_head.dense.weight.grad)
        assert torch.equal(*gradients)

    def test_an_encoder_writes_nothing(self):
        with pytest.raises(ValueError, match="load it with is_decoder=True"):
            text("Data2VecTextForCausalLM").generate(self.ids[:1])

    def test_prompts_padded_on_the_right_are_refused(self):
        with pytest.raises(ValueError, match="pad prompts on the left"):
            text("Data2VecTextForCausalLM", is_decoder=True).generate(self.ids, self.mask)

    def test_positions_count_what_is_not_padding(self, tmp_path):
        model = text()
        reference = as_theirs(model, tmp_path)
        for ids in ([[5, 1, 6, 7]], [[1, 1, 5, 6]]):
            ids = torch.tensor(ids)
            expected = reference(ids).last_hidden_state
            torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-6, rtol=1e-5)
        embedded = model.get_input_embeddings()(self.ids)
        expected = reference(inputs_embeds=embedded, attention_mask=self.mask).last_hidden_state
        found = model(inputs_embeds=embedded, attention_mask=self.mask).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)

    def test_one_token_too_many(self):
        model = text()
        model(torch.full((1, 38), 5))
        with pytest.raises(ValueError, match="39 tokens; .* 38"):
            model(torch.full((1, 39), 5))

    def test_padding_changes_nothing(self):
        model = text()
        alone = model(self.ids[1:, :3]).last_hidden_state
        torch.testing.assert_close(model(self.ids, self.mask).last_hidden_state[1:, :3], alone, atol=2e-6, rtol=1e-5)

    def test_both_or_no_inputs_are_refused(self):
        for given in ({}, {"input_ids": self.ids, "inputs_embeds": torch.zeros(2, 5, 32)}):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                text()(**given)

    @pytest.mark.parametrize("size", [50, 71])
    @pytest.mark.parametrize("tied", [True, False])
    def test_another_vocabulary(self, size, tied, tmp_path):
        model = text("Data2VecTextForMaskedLM", tie_word_embeddings=tied)
        before = model(self.ids).logits
        model.resize_token_embeddings(size)
        kept = min(size, 60)
        torch.testing.assert_close(model(self.ids).logits[..., :kept], before[..., :kept])
        assert (model.lm_head.decoder.weight is model.get_input_embeddings().weight) is tied
        again = as_theirs(model, tmp_path)
        torch.testing.assert_close(again(self.ids).logits, model(self.ids).logits, atol=1e-6, rtol=1e-5)

    def test_the_problem_type_is_inferred_and_the_config_left_alone(self):
        model = text("Data2VecTextForSequenceClassification", num_labels=2)
        model(self.ids, labels=torch.tensor([0, 1]))
        assert model.config.problem_type is None
        compatible = text("Data2VecTextForSequenceClassification", num_labels=2, hf_compat=True)
        compatible(self.ids, labels=torch.tensor([0, 1]))
        assert compatible.config.problem_type == "single_label_classification"

    def test_gradient_accumulation(self):
        model = text("Data2VecTextForCausalLM", is_decoder=True)
        mean = model(self.ids[:1], labels=self.ids[:1]).loss
        torch.testing.assert_close(model(self.ids[:1], labels=self.ids[:1], num_items_in_batch=8).loss, mean * 4 / 8)

    def test_cross_attention_needs_a_decoder(self):
        with pytest.raises(ConfigError, match="set is_decoder=True"):
            text(add_cross_attention=True)


class TestVision:
    @pytest.mark.parametrize("size", [(48, 48), (48, 32), (40, 40)])
    @pytest.mark.parametrize("both", [False, True])
    def test_other_sizes(self, size, both, tmp_path):
        more = {"use_relative_position_bias": True, "use_absolute_position_embeddings": True} if both else {}
        model = vision(**more)
        reference = as_theirs(model, tmp_path)
        images = torch.randn(2, 3, *size)
        expected = reference(images).last_hidden_state
        torch.testing.assert_close(model(images).last_hidden_state, expected, atol=2e-6, rtol=1e-5)

    def test_images_that_are_not_square_have_the_right_bias(self, tmp_path):
        images = torch.randn(1, 3, 32, 48)
        model = vision(image_size=[32, 48], hf_compat=True)
        reference = as_theirs(model, tmp_path)
        expected = reference(images).last_hidden_state
        torch.testing.assert_close(model(images).last_hidden_state, expected, atol=2e-6, rtol=1e-5)
        right = ours.Data2VecVisionModel.from_pretrained(tmp_path)
        table = right.encoder.relative_biases[0]
        plain = table.table[table.index].permute(2, 0, 1)[None]
        assert torch.equal(table((4, 6)).dense(), plain)
        assert float((right(images).last_hidden_state - expected).abs().max()) > 1e-3

    def test_segmentation_reads_the_blocks_that_the_config_names(self):
        options = {"num_hidden_layers": 6, "out_indices": [2, 3, 4, 5], "num_labels": 3, "auxiliary_channels": 8}
        for compatible in (False, True):
            model = vision("Data2VecVisionForSemanticSegmentation", **options, hf_compat=compatible)
            model.train()(torch.randn(2, 3, 32, 32), labels=torch.randint(0, 3, (2, 32, 32))).loss.backward()
            blocks = model.get_encoder().transformer.blocks
            learns = [block.ffn.fc1.weight.grad is not None for block in blocks]
            # Without `hf_compat` the last block learns; with it, the last two do not.
            assert learns == [True] * 4 + [not compatible] * 2

    def test_segmentation_in_training_is_that_of_transformers(self, tmp_path):
        options = {"num_hidden_layers": 5, "out_indices": [1, 2, 3, 4], "num_labels": 3, "auxiliary_channels": 8}
        model = vision("Data2VecVisionForSemanticSegmentation", **options, hf_compat=True, drop_path_rate=0.0)
        reference = as_theirs(model, tmp_path)
        images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
        expected, found = reference.train()(images, labels=labels), model.train()(images, labels=labels)
        torch.testing.assert_close(found.logits, expected.logits, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=1e-6)
        model.save_pretrained(tmp_path / "again")
        again = type(reference).from_pretrained(tmp_path / "again").state_dict()
        counters = {name: tensor for name, tensor in again.items() if name.endswith("num_batches_tracked")}
        assert len(counters) > 10
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=1e-5)
        assert {int(counter) for counter in counters.values()} == {1}

    def test_four_layers_are_needed_and_have_to_exist(self):
        with pytest.raises(ConfigError, match="reads 4 layers"):
            vision("Data2VecVisionForSemanticSegmentation", out_indices=[0, 1])
        with pytest.raises(ConfigError, match="the model has layers 0 to 2"):
            vision("Data2VecVisionForSemanticSegmentation", out_indices=[0, 1, 2, 3])

    def test_a_released_mask_token_is_kept(self, tmp_path):
        model = vision(use_mask_token=True)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"use_mask_token": False}
        (tmp_path / "config.json").write_text(json.dumps(config))
        again = ours.Data2VecVisionModel.from_pretrained(tmp_path)
        assert torch.equal(again.encoder.mask_token, model.encoder.mask_token)

    def test_hiding_patches_needs_a_mask_token(self):
        with pytest.raises(ConfigError, match="use_mask_token=True"):
            vision()(torch.randn(1, 3, 32, 32), bool_masked_pos=torch.ones(1, 16))

    def test_other_channels_are_refused(self):
        with pytest.raises(ValueError, match="expected images with 3 channels"):
            vision()(torch.randn(1, 1, 32, 32))


MODELS = {
    "audio": (lambda: audio("Data2VecAudioForCTC", vocab_size=9), {"input_values": torch.randn(2, 600)}),
    "text": (lambda: text("Data2VecTextForTokenClassification"), {"input_ids": TestText.ids}),
    "vision": (lambda: vision("Data2VecVisionForImageClassification"), {"pixel_values": torch.randn(2, 3, 32, 32)}),
}


@pytest.mark.parametrize("wanted", [-1, 2, [0, 2], [-2, 1]])
@pytest.mark.parametrize("weighted", [False, True])
def test_some_hidden_states_can_be_chosen(wanted, weighted, tmp_path):
    model = audio("Data2VecAudioForSequenceClassification", use_weighted_layer_sum=weighted, hf_compat=True)
    reference = as_theirs(model, tmp_path)
    waves, mask = padded_waveforms()
    expected = reference(waves, mask, output_hidden_states=wanted).hidden_states
    found = model(waves, mask, output_hidden_states=wanted).hidden_states
    assert [state is None for state in found] == [state is None for state in expected]
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", MODELS)
class TestAll:
    def test_loading_as_on_the_page_of_transformers(self, family, tmp_path):
        make, given = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa", device_map="auto")
        given = {name: tensor.to(again.device) for name, tensor in given.items()}
        assert again.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert not again.training
        torch.testing.assert_close(again(**given).logits.cpu(), model(**{k: v.cpu() for k, v in given.items()}).logits)

    def test_recomputing_activations_changes_no_bit(self, family):
        make, given = MODELS[family]
        gradients = []
        for checkpointing in (False, True):
            model = make()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            model.train()
            np.random.seed(0)
            if checkpointing:
                model.gradient_checkpointing_enable()
                assert model.is_gradient_checkpointing
            model(**given).logits.square().sum().backward()
            gradients.append(
                {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
            )
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())

    def test_outputs_as_tuples_and_by_name(self, family):
        make, given = MODELS[family]
        model = make()
        output = model(**given, output_hidden_states=True)
        plain = model(**given, output_hidden_states=True, return_dict=False)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], output.logits)
        assert torch.equal(output[0], output["logits"])
        assert list(output) == ["logits", "hidden_states"]
        assert output.loss is None
        with pytest.raises(AttributeError, match="no field 'logit'"):
            _ = output.logit

    def test_attention_weights_come_from_every_backend(self, family):
        make, given = MODELS[family]
        model = make()
        weights = {}
        for backend in ("eager", "sdpa"):
            model.set_attn_implementation(backend)
            weights[backend] = model(**given, output_attentions=True).attentions
        assert len(weights["sdpa"]) == 3
        for a, b in zip(*weights.values(), strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)))

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
    def test_other_types(self, family, dtype, tmp_path):
        make, _ = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        low = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert low.dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype)
        low.save_pretrained(tmp_path / "low")
        assert type(model).from_pretrained(tmp_path / "low").dtype == low.dtype
        assert type(model).from_pretrained(tmp_path, torch_dtype=dtype).dtype == low.dtype
        assert type(model).from_pretrained(tmp_path / "low", dtype="float32").dtype == torch.float32

    def test_bfloat16_is_near_float32(self, family):
        make, given = MODELS[family]
        model = make()
        expected = model(**given).logits
        given = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
        found = model.bfloat16()(**given).logits.float()
        assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())

    def test_files_that_do_not_fit_are_refused_with_every_name(self, family, tmp_path):
        from safetensors.torch import load_file, save_file

        make, _ = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        first, second, third = [name for name in tensors if ".encoder.layer" in name and name.endswith("weight")][:3]
        tensors[second] = tensors[second][:-1].contiguous()
        tensors["tampered"] = tensors.pop(first)
        save_file(tensors, path)
        with pytest.raises(WeightMismatch) as error:
            type(model).from_pretrained(tmp_path)
        for words in (f"missing: {first}", "unexpected: tampered", f"of another shape: {second}"):
            assert words in str(error.value)
        assert third not in str(error.value)

    def test_a_file_of_the_same_class_has_to_have_its_head(self, family, tmp_path):
        from safetensors.torch import load_file, save_file

        make, _ = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        last = [name for name in tensors if name.startswith(("lm_head", "classifier"))][-1]
        save_file({name: tensor for name, tensor in tensors.items() if name != last}, path)
        with pytest.raises(WeightMismatch, match=f"missing: {last}$"):
            type(model).from_pretrained(tmp_path)

    def test_truncated_and_absent_files_are_refused(self, family, tmp_path):
        make, _ = MODELS[family]
        model = make()
        with pytest.raises(ConfigError, match="has no weights"):
            type(model).from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ConfigError, match="not an intact safetensors file"):
            type(model).from_pretrained(tmp_path)

    def test_pickled_tensors_load_and_pickled_code_does_not_run(self, family, tmp_path):
        make, given = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        from data2vec_train.weights.names import to_theirs

        (tmp_path / "model.safetensors").unlink()
        torch.save(to_theirs(model.names(), model.state_dict()), tmp_path / "pytorch_model.bin")
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(**given).logits, model(**given).logits)

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/ran",)

        torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ConfigError, match="more than tensors"):
            type(model).from_pretrained(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_sharded_folders_load(self, family, tmp_path):
        make, given = MODELS[family]
        model = make()
        as_theirs(model, tmp_path).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
        again = type(model).from_pretrained(tmp_path / "shards")
        assert torch.equal(again(**given).logits, model(**given).logits)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"attn_implementation": "flash9"}, "attn_implementation='flash9' does not exist"),
            ({"dtype": "int8"}, "not a floating-point type"),
            ({"device_map": {"a": 0}}, "never split"),
            ({"device_map": "nowhere"}, "expected 'auto' or a device"),
            ({"hiden_size": 3}, "no field hiden_size"),
        ],
    )
    def test_settings_that_cannot_be_met(self, family, options, message, tmp_path):
        make, _ = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=message):
            type(model).from_pretrained(tmp_path, **options)

    def test_a_base_model_gets_a_fresh_head_and_says_so(self, family, tmp_path, caplog):
        make, _ = MODELS[family]
        model = make()
        base = model.base_model
        base.save_pretrained(tmp_path)
        headed, report = type(model).from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
        assert report.fresh
        assert not report.left_out
        assert "newly initialised" in caplog.text
        for name, tensor in base.encoder.state_dict().items():
            assert torch.equal(headed.get_encoder().state_dict()[name], tensor)
        headed.save_pretrained(tmp_path / "headed")
        _, report = type(base).from_pretrained(tmp_path / "headed", output_loading_info=True)
        assert report.left_out

    def test_another_number_of_labels_has_to_be_allowed(self, family, tmp_path):
        make, _ = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        name = "vocab_size" if family == "audio" else "num_labels"
        with pytest.raises(WeightMismatch, match="of another shape"):
            type(model).from_pretrained(tmp_path, **{name: 7})
        _, report = type(model).from_pretrained(
            tmp_path, **{name: 7}, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert len(report.fresh) == 2

    def test_configs_of_other_models_are_refused(self, family, tmp_path):
        make, _ = MODELS[family]
        model = make()
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "beit"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="model type 'beit'"):
            type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["Data2VecAudioConfig", "Data2VecTextConfig", "Data2VecVisionConfig"])
def test_configs_have_the_defaults_of_transformers(name):
    theirs, own = getattr(transformers, name)().to_dict(), getattr(ours, name)().to_dict()
    ignored = {"transformers_version", "_name_or_path", "architectures", "dtype", "is_encoder_decoder"}
    ignored |= {"tie_word_embeddings", "apply_spec_augment", "problem_type"}
    expected = {key: list(v) if isinstance(v, tuple) else v for key, v in theirs.items() if key not in ignored}
    expected["id2label"] = {str(key): value for key, value in expected["id2label"].items()}
    found = {key: value for key, value in own.items() if key in expected}
    assert found == expected


def test_label_names_and_unknown_fields_are_kept(tmp_path):
    config = ours.Data2VecVisionConfig(id2label={0: "cat", 1: "dog", 2: "owl"})
    assert config.num_labels == 3
    assert config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    config.unknown["written_by"] = "somebody"
    config.save_pretrained(tmp_path)
    again = ours.Data2VecVisionConfig.from_pretrained(tmp_path)
    assert again.id2label == config.id2label
    assert again.unknown["written_by"] == "somebody"


def test_importing_is_quick_and_brings_nothing_heavy():
    names = ", ".join(name for name in ours.__all__ if name.startswith("Data2Vec") and name != "Data2VecModule")
    code = f"from data2vec_train import {names}, load_pretrained, save_pretrained"
    heavy = ["transformers", "lightning", "hydra", "omegaconf", "datasets", "torchvision", "torchaudio", "onnx", "PIL"]
    listed = f"{code}; import sys; print([one for one in {heavy!r} if one in sys.modules])"
    assert subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True).stdout.strip() == "[]"

    def seconds(statement: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", statement], check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Seconds of the processor, the best of three, interleaved: machines are busy at times.
    measured = [(seconds("import torch"), seconds("import torch, data2vec_train"), seconds(code)) for _ in range(3)]
    alone, package, everything = (min(column) for column in zip(*measured, strict=True))
    assert package <= alone + 0.5
    assert everything <= alone + 0.5


def test_an_encoder_of_a_plugin_goes_the_same_way(monkeypatch, tmp_path):
    from data2vec_train.weights import plugin
    from data2vec_train.weights.convert import load_pretrained, save_pretrained, wrap

    arguments = {"channels": 19, "window": 25, "dim": 32, "depth": 2, "num_heads": 4, "ffn_dim": 48}
    arguments["attention"] = "sdpa"
    monkeypatch.delitem(sys.modules, "eeg", raising=False)  # of other tests in this process
    monkeypatch.delenv("DATA2VEC_PLUGINS", raising=False)
    with pytest.raises(ConfigError, match="encoder eeg.EEGEncoder is not loaded; import eeg first"):
        plugin.encoder_class("eeg.EEGEncoder")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugins"))
    import eeg

    tensors = eeg.EEGEncoder(**arguments).state_dict()
    model = wrap("eeg.EEGEncoder", arguments, tensors, where="here")
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    recording = torch.randn(2, 19, 200)
    assert torch.equal(again(recording).last_hidden_state, model.eval()(recording).last_hidden_state)
    sys.modules.pop("eeg")
    for target in ("os.system", "data2vec_train.weights.plugin.PluginConfig", "nowhere"):
        with pytest.raises(ConfigError, match="is not loaded"):
            plugin.encoder_class(target)
