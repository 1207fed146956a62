"""How records become inputs of a model, in fine-tuning and prediction."""

from pathlib import Path

from omegaconf import DictConfig

from data2vec_train.config.build import build
from data2vec_train.config.inputs import given_settings
from data2vec_train.finetune.base import Inputs
from data2vec_train.weights.base import PretrainedModel
from data2vec_train.weights.tokenizers import TextTokenizer


def inputs_of(cfg: DictConfig, model: PretrainedModel) -> Inputs:
    """How records become inputs of the model's encoder; call it after `inherit`.

    Raises:
        ConfigError: the tokenizer does not belong to the encoder.
    """
    encoder = model.get_encoder()
    common = {"modality": cfg.modality.name, "token_count": encoder.token_count, "dim": encoder.dim}
    if cfg.modality.name != "text":
        rate = cfg.modality.get("sample_rate_hz", 0)
        common |= {"pad_value": cfg.modality.pad_value}
        how = {"decode": build(cfg.modality.decode), "transform": build(cfg.modality.transform)}
        return Inputs(**how, sample_rate_hz=rate, **common)
    tokenizer = text_tokenizer(cfg)
    tokenizer.check_fits(model.config)
    how = {"blocks": build(cfg.modality.prepare), "encodings": list(cfg.modality.encodings)}
    longest = cfg.modality.block_tokens if "modality.block_tokens" in given_settings() else encoder.max_tokens
    return Inputs(tokenizer=tokenizer, max_tokens=longest, **how, **common)


def text_tokenizer(cfg: DictConfig) -> TextTokenizer:
    """The tokenizer of a composed config: as pretraining uses it, or as the files beside the weights describe it."""
    from data2vec_train.data.tokenizer import Tokenizer

    path = cfg.modality.tokenizer.path
    if path is not None and Path(path).expanduser().is_dir():
        return TextTokenizer.from_pretrained(Path(path).expanduser())
    tokenizer = Tokenizer.load(path)
    return TextTokenizer.from_json(tokenizer.to_json(), tokens=tokenizer.special_tokens)
