"""Makes MDLM known to transformers' Auto classes in this process."""

from __future__ import annotations


def register() -> None:
    """Let AutoConfig and AutoModelForMaskedLM handle model type "mdlm" without `trust_remote_code`.

    A registered model that is saved with `save_pretrained` carries its code along, so that it also loads
    where this package is not installed. Calling this again changes nothing.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    from mdlm_interp.hf.configuration_mdlm import MDLMConfig
    from mdlm_interp.hf.modeling_mdlm import MDLM

    AutoConfig.register(MDLMConfig.model_type, MDLMConfig, exist_ok=True)
    AutoModelForMaskedLM.register(MDLMConfig, MDLM, exist_ok=True)
    MDLMConfig.register_for_auto_class("AutoConfig")  # type: ignore[no-untyped-call]
    MDLM.register_for_auto_class("AutoModelForMaskedLM")  # type: ignore[no-untyped-call]
