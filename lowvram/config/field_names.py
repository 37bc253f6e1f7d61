"""Maps other projects' names of keys and commands to ours, for error messages only; other names are never accepted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lowvram.errors import name_nearest


class Meant(NamedTuple):
    """What another project's name means here.  key: our key, or our option.  note: a sentence about the difference."""

    key: str
    note: str = ""


_TOKENS = "It counts tokens: steps × train.batch_tokens."
_EPOCHS = "It counts tokens: epochs × the tokens of the text."
_BATCH = (
    "It counts tokens, not sequences: sequences × train.seq_len. "
    "How many run at a time is an option: `lowvram train --micro-batch`."
)
_EVERY = "It counts steps."
_OWN_CARD = (
    "This command computes on this machine's own card, and --device chooses which kind; --gpu CARD belongs to "
    "`lowvram fit`, which judges a card that need not be here."
)
_WHERE = "It is no part of what is learnt: `lowvram fit --gpu CARD` and `lowvram train --device` take it."

_NAMES: dict[Meant, str] = {
    Meant("model.layers"): "n_layer n_layers num_layers num_hidden_layers depth n_blocks num_blocks",
    Meant("model.dim"): "width hidden_size n_embd d_model embed_dim embedding_dim model_dim emb_dim hidden_dim",
    Meant(
        "model.vocabulary", "It follows the tokenizer, so leave it out."
    ): "vocab_size n_vocab vocab padded_vocab_size",
    Meant("model.attention.heads"): "n_head n_heads num_heads num_attention_heads attention_heads",
    Meant("model.attention.kv_heads"): "num_key_value_heads n_kv_heads num_kv_heads n_kv_head n_query_groups",
    Meant("model.attention.head_dim"): "head_size d_head d_k",
    Meant("model.attention.kind", '"gqa" or "mla".'): "attention_type attn attn_type",
    Meant(
        "model.ffn.hidden"
    ): "intermediate_size ffn_dim d_ff d_inner n_inner mlp_dim ffn_hidden ffn_hidden_size mlp_ratio",
    Meant("model.ffn.experts"): "num_experts n_experts num_local_experts n_routed_experts",
    Meant("model.ffn.top_k"): "num_experts_per_tok experts_per_token moe_top_k num_selected_experts",
    Meant("model.ffn.shared"): "n_shared_experts num_shared_experts",
    Meant("model.ffn.expert_hidden"): "moe_intermediate_size expert_dim",
    Meant("model.positions.theta"): "rope_theta rope_base rotary_base",
    Meant("model.window.size"): "sliding_window window_size attention_window",
    Meant("model.tied"): "tie_word_embeddings tie_embeddings tie_weights weight_tying",
    Meant("model.norm_eps"): "rms_norm_eps layer_norm_eps layernorm_epsilon rms_eps",
    Meant("train.tokens"): "max_tokens num_tokens total_tokens train_tokens target_tokens",
    Meant("train.tokens", _TOKENS): "max_steps max_iters num_steps num_iterations iterations steps total_steps n_steps",
    Meant("train.tokens", _EPOCHS): "epochs num_epochs num_train_epochs epoch",
    Meant("train.seq_len"): "max_seq_len block_size context_length seq_length sequence_length max_position_embeddings "
    "n_ctx n_positions ctx_len context max_length max_seq_length context_size ctx context_window sequence_len",
    Meant(
        "train.batch_tokens", _BATCH
    ): "batch_size global_batch_size total_batch_size train_batch_size micro_batch_size "
    "per_device_train_batch_size device_batch_size gradient_accumulation_steps grad_accum accumulate micro_batch",
    Meant("train.optimizer.lr"): "learning_rate lr max_lr peak_lr base_lr",
    Meant("train.optimizer.decay"): "weight_decay wd l2",
    Meant("train.optimizer.name", '"adamw" or "muon".'): "optim optimizer_type optimizer_name adam adamw muon",
    Meant("train.optimizer.beta1"): "adam_beta1 betas",
    Meant("train.optimizer.beta2"): "adam_beta2",
    Meant("train.optimizer.eps"): "adam_epsilon epsilon",
    Meant("train.optimizer.bits", "8 is the small one."): "use_8bit adam_8bit adamw_8bit load_in_8bit optim_bits",
    Meant("train.schedule.kind", '"cosine" or "wsd".'): "lr_scheduler lr_scheduler_type scheduler lr_schedule decay_lr",
    Meant(
        "train.schedule.warmup", "It is a share of all steps: 0.02."
    ): "warmup_steps warmup_ratio warmup_iters warmup",
    Meant("train.schedule.floor", "It is a share of the highest rate."): "min_lr min_lr_ratio lr_min",
    Meant("train.clip"): "grad_clip max_grad_norm clip_grad clip_grad_norm gradient_clipping gradient_clip_val",
    Meant("train.precision"): "dtype mixed_precision bf16 fp16 amp torch_dtype compute_dtype",
    Meant("train.start_from"): "resume_from_checkpoint init_from from_checkpoint pretrained finetune_from",
    Meant("train.seed"): "random_seed rng_seed data_seed",
    Meant("train.dropout"): "dropout_rate hidden_dropout resid_pdrop attn_pdrop attention_dropout",
    Meant("data.train"): "dataset data_path train_data train_file data_dir train_files dataset_path",
    Meant("data.valid"): "val_data valid_data validation eval_data validation_file val test_data eval_file dev",
    Meant("data.tokenizer"): "tokenizer_path tokenizer_name tokenizer_dir",
    Meant("run.dir"): "output_dir out_dir save_dir checkpoint_dir log_dir run_dir",
    Meant(
        "run.save_every_minutes", "It counts minutes."
    ): "save_steps save_interval save_every checkpoint_every save_freq",
    Meant("run.keep"): "save_total_limit keep_last max_checkpoints keep_checkpoints",
    Meant(
        "run.validate_every", _EVERY
    ): "eval_steps eval_interval eval_every val_interval val_every evaluation_strategy",
    Meant("run.validate_tokens", "It counts tokens."): "eval_iters eval_batches val_tokens eval_tokens",
    Meant("run.sample_every", _EVERY): "generate_every sample_interval",
    Meant(
        "run.log", '"tensorboard" or "wandb"; log.jsonl is always written.'
    ): "report_to logger loggers wandb tensorboard",
    Meant("--gpu", _WHERE): "gpu gpus device devices cuda num_gpus accelerator",
    Meant(
        "--recompute", "`lowvram train --recompute` takes it; without it the machine decides."
    ): "gradient_checkpointing activation_checkpointing checkpoint_activations recompute",
    Meant("--compile", "`lowvram train --compile` takes it; without it a trial decides."): "compile torch_compile",
}
_MEANT = {name: meant for meant, names in _NAMES.items() for name in names.split()}

# For a key of a run file, or another option: the options that take the same value, in order of preference.
_OPTIONS = {
    "model.vocabulary": ("--vocab",),
    "train.tokens": ("--tokens",),
    "train.seq_len": ("--context",),
    "train.precision": ("--precision", "--dtype"),
    "train.seed": ("--seed",),
    "data.train": ("--data",),
    "data.valid": ("--data",),
    "data.tokenizer": ("--tokenizer",),
    "run.dir": ("--out", "--dir"),
    "--gpu": ("--device", "--gpu"),
    "--recompute": ("--recompute",),
    "--compile": ("--compile",),
}
# Names with these notes count something other than tokens, so no option takes their value unchanged.
_CONVERTED = {_TOKENS, _EPOCHS}

# What other projects call our commands.
_COMMANDS = {
    "generate": "chat",
    "sample": "chat",
    "talk": "chat",
    "run": "chat",
    "infer": "chat",
    "inference": "chat",
    "pretrain": "train",
    "eval": "evaluate",
    "test": "evaluate",
    "convert": "export",
    "check": "doctor",
    "info": "doctor",
    "plan": "fit",
    "estimate": "fit",
    "tokenize": "data pack",
    "pack": "data pack",
    "prepare": "data pack",
    "tokenise": "data pack",
    "api": "serve",
    "server": "serve",
}


def find_meant(word: str) -> Meant | None:
    """Return what another project's name means here, in any spelling: `n_embd`, `--n-embd`, `nEmbd`, `N_EMBD`."""
    plain = word.strip("-").replace("-", "_")
    snake = "".join(f"_{c.lower()}" if c.isupper() and not plain.isupper() else c.lower() for c in plain).strip("_")
    return _MEANT.get(snake)


def answer_key(word: str, known: Iterable[str], full_names: Mapping[str, str]) -> str:
    """Return a sentence about a key that does not exist: its full name, its name here, or the nearest key.

    known: the keys of the table in which it was written.  full_names: every key of a run file, with its full name.
    """
    if word in full_names:
        return f"It is {full_names[word]}."
    if (meant := find_meant(word)) is not None:
        return f"It is called {meant.key} here. {meant.note}".strip()
    return name_nearest(word, known)


def answer_option(word: str, options: Iterable[str], full_names: Mapping[str, str]) -> str:
    """Return a sentence about an option that a command does not have: its name here, a key, or the nearest option.

    options: those of the command; a key of a run file is named only if one of them is --set.  full_names: as for
    `answer_key`.
    """
    options, meant = list(options), find_meant(word)
    takes_run_file = "--set" in options
    key = meant.key if meant is not None else full_names.get(word.strip("-").replace("-", "_"))
    if meant is None or meant.note not in _CONVERTED:
        here = next((option for option in _OPTIONS.get(key or "", ()) if option in options), None)
        if here == "--device" and word == "--gpu":
            return _OWN_CARD
        if here is not None:
            return f"It is called {here} here."
    if meant is not None and meant.key.startswith("--"):
        return meant.note
    if key is not None and takes_run_file:
        note = f" {meant.note}" if meant is not None and meant.note else ""
        return f"It is {key} of a run file, which `lowvram train RUN.toml --set {key}=VALUE` sets.{note}"
    return name_nearest(word, options)


def answer_command(word: str, commands: Iterable[str]) -> str:
    """Return a sentence about a command that does not exist."""
    if word in _COMMANDS:
        return f"It is called `lowvram {_COMMANDS[word]}` here."
    return name_nearest(word, commands)
