"""The model classes of vLLM, and whether they can be served with LoRA adapters.

Read from vLLM 0.33.0 (commit 4ba787ec9): every architecture of ``vllm/model_executor/models/registry.py``, and whether
the class that it names inherits ``SupportsLoRA``. Draft models are left out, and DeepSeek V4, whose class depends on
the device.
"""

from __future__ import annotations

_WITH_LORA = """
    AXK1ForCausalLM AfmoeForCausalLM AliceAIForCausalLM Alpamayo2Super ApertusForCausalLM ArceeForCausalLM
    AudioFlamingo3ForConditionalGeneration BagelForConditionalGeneration BailingMoeForCausalLM
    BailingMoeV2ForCausalLM BertForSequenceClassification BertForTokenClassification BertModel
    BertSpladeSparseEmbeddingModel BgeM3EmbeddingModel Blip2ForConditionalGeneration ChatGLMForConditionalGeneration
    ChatGLMModel ClefFlashForJointSchema ClefOmniForJointSchema Cohere2ForCausalLM
    CohereCompassForConditionalGeneration CohereForCausalLM ColPaliForRetrieval ColQwen3 ColQwen3_5
    Cosmos3ForConditionalGeneration CwmForCausalLM D3ForSequenceClassification DeciLMForCausalLM DeepseekForCausalLM
    DeepseekOCR2ForCausalLM DeepseekOCRForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM
    DeepseekV3BidirectionalModel DeepseekV3ForCausalLM DotsOCRForCausalLM Eagle2_5_VLForConditionalGeneration
    Emu3ForConditionalGeneration Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration
    Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration ExaoneForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconH1ForCausalLM FlexOlmoForCausalLM GLM4VForCausalLM GPTBigCodeForCausalLM
    GPTNeoXForCausalLM Gemma2ForCausalLM Gemma2Model Gemma3ForCausalLM Gemma3ForConditionalGeneration
    Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM
    Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration
    Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration GlmAsrForConditionalGeneration GlmForCausalLM
    GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration GptOssForCausalLM Granite4VisionForConditionalGeneration
    GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM
    GraniteMoeSharedForCausalLM GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration
    GraniteSpeechPlusForConditionalGeneration H2OVLChatModel HF_ColBERT HYV3ForCausalLM HYV4ForCausalLM
    HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration HyperCLOVAXForCausalLM
    IQuestCoderForCausalLM Idefics3ForConditionalGeneration InklingForCausalLM InklingForConditionalGeneration
    InternLM2ForCausalLM InternLM2ForRewardModel InternLM3ForCausalLM InternS1ForConditionalGeneration
    InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
    InternS2PreviewForConditionalGeneration InternVLChatModel InternVLForConditionalGeneration
    IsaacForConditionalGeneration Jais2ForCausalLM JambaForCausalLM JambaForSequenceClassification
    JinaEmbeddingsV5Model JinaVLForRanking K2HorizonForCausalLM KeyeForConditionalGeneration
    KeyeVL1_5ForConditionalGeneration Kolibri1ForCausalLM LLaMAForCausalLM LagunaForCausalLM Lfm2ForCausalLM
    Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration LightOnOCRForConditionalGeneration Llama4ForCausalLM
    Llama4ForConditionalGeneration LlamaBidirectionalForSequenceClassification LlamaBidirectionalModel
    LlamaForCausalLM LlamaModel LlamaNemotronVLForSequenceClassification LlamaNemotronVLModel Llama_Nemotron_Nano_VL
    LlavaForConditionalGeneration LlavaNextForConditionalGeneration LlavaNextVideoForConditionalGeneration
    LongcatFlashForCausalLM LongcatFlashNgramForCausalLM MellumForCausalLM MiMoForCausalLM MiniCPM3ForCausalLM
    MiniCPMForCausalLM MiniCPMO MiniCPMOcrForConditionalGeneration MiniCPMV MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration
    MistralForCausalLM MistralLarge3ForCausalLM MistralModel MixtralForCausalLM ModernBertModel
    Molmo2ForConditionalGeneration MolmoForCausalLM MossAudioModel MuseGlimmerForCausalLM
    MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration NVLM_D NanbeigeForCausalLM
    NemotronForCausalLM NemotronHForCausalLM NemotronHPuzzleForCausalLM NemotronH_Nano_Omni_Reasoning_V3
    NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3 NemotronH_Super_Omni_Reasoning_V3 OPTForCausalLM
    Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM
    OpenCUAForConditionalGeneration OpenPanguVLForConditionalGeneration OpsColQwen3Model
    PaliGemmaForConditionalGeneration PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM
    Param2MoEForCausalLM Phi3ForCausalLM Phi4MMForCausalLM PhiForCausalLM PhiMoEForCausalLM
    PixtralForConditionalGeneration Plamo3ForCausalLM QianfanOCRForConditionalGeneration Qwen2ForCausalLM
    Qwen2ForProcessRewardModel Qwen2ForRewardModel Qwen2Model Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration
    Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel Qwen2_5_VLForConditionalGeneration
    Qwen3ASRForConditionalGeneration Qwen3ASRForcedAlignerForTokenClassification Qwen3ASRRealtimeGeneration
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3VLNemotronEmbedModel Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen4ExpForCausalLM
    Qwen4ExpForConditionalGeneration Rnj1ForCausalLM RobertaForMaskedLM RobertaForSequenceClassification
    RobertaModel SarvamMLAForCausalLM SarvamMoEForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
    SmolVLMForConditionalGeneration SolarForCausalLM Starcoder2ForCausalLM Step5ForCausalLM
    Step5ForConditionalGeneration TeleChat2ForCausalLM TeleChat3ForCausalLM TeleFLMForCausalLM UltravoxModel
    UnlimitedOCRForCausalLM VaultGemmaForCausalLM VibeVoiceAsrForConditionalGeneration
    VoxtralForConditionalGeneration VoxtralRealtimeGeneration VoyageQwen3BidirectionalEmbedModel
    WhisperForConditionalGeneration XLMRobertaForSequenceClassification XLMRobertaModel
"""
_WITHOUT_LORA = """
    AriaForConditionalGeneration BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM
    BailingMoeV3VLForConditionalGeneration BeamForCausalLM BeeForConditionalGeneration BertForMaskedLM
    BloomForCausalLM CLIPModel Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration
    CohereAsrForConditionalGeneration ColBERTJinaRobertaModel ColBERTLfm2Model ColBERTModernBertModel
    ColModernVBertForRetrieval ColUltraVBertForRetrieval Cosmos3EdgeForConditionalGeneration DbrxForCausalLM
    DeepseekV41ForCausalLM DeepseekVLV2ForCausalLM DiffusionGemmaForBlockDiffusion DomynEdgeForCausalLM
    DoryForCausalLM Dots3NoteForCausalLM EmbeddingGemma2Model FalconForCausalLM FalconMambaForCausalLM
    FireRedASR2ForConditionalGeneration FlintForCausalLM FunASRForConditionalGeneration
    FunAudioChatForConditionalGeneration GPT2ForSequenceClassification GPT2LMHeadModel GPTJForCausalLM
    Gemma3TextModel Gemma3nForCausalLM Gemma3nForConditionalGeneration Glm5NextForCausalLM GteModel
    GteNewForSequenceClassification GteNewModel HCXVisionV2ForCausalLM HfMoondream HrmTextForCausalLM
    IQuestLoopCoderForCausalLM JinaForRanking KananaVForConditionalGeneration KimiK25ForConditionalGeneration
    KimiK3ForConditionalGeneration KimiLinearForCausalLM KimiVLForConditionalGeneration Lfm2BidirectionalModel
    LlavaOnevision2ForConditionalGeneration LlavaOnevisionForConditionalGeneration Mamba2ForCausalLM
    MambaForCausalLM MiDashengLMModel MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiMoV2OmniForCausalLM
    MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration ModernBertForSequenceClassification
    ModernBertForTokenClassification ModernVBertModel Moondream3ForCausalLM MoonshotKimiaForCausalLM
    MossTranscribeDiarizeForConditionalGeneration NemotronParseForConditionalGeneration NomicBertModel
    OpenAIPrivacyFilterForTokenClassification OpenVLAForActionPrediction OrionForCausalLM Ovis Ovis2_5
    Ovis2_6ForCausalLM Ovis2_6_MoeForCausalLM PaddleOCRVLForConditionalGeneration Phi3VForCausalLM Phi4ForCausalLMV
    Qwen2AudioForConditionalGeneration RForConditionalGeneration RadioMBartPrefixForCausalLM
    RobertaForTokenClassification SiglipModel SkyworkR1VChatModel StableLmForCausalLM Step1ForCausalLM
    Step3TextForCausalLM Step3VLForConditionalGeneration Step3p5ForCausalLM Step3p7ForConditionalGeneration
    StepVLForConditionalGeneration Terratorch XLMRobertaForTokenClassification Zamba2ForCausalLM
"""
_LORA = dict.fromkeys(_WITH_LORA.split(), True) | dict.fromkeys(_WITHOUT_LORA.split(), False)

#: A classifier that vLLM does not list is made of the class with one of these endings, tried in this order.
_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel", "Model")
_CLASSIFIER = "ForSequenceClassification"


def supports_lora(architecture: str) -> bool | None:
    """Return whether vLLM serves this class of transformers with adapters; None where it does not list the class.

    Example:
        >>> supports_lora("LlamaForCausalLM"), supports_lora("GPT2LMHeadModel"), supports_lora("LinearForCausalLM")
        (True, False, None)
        >>> supports_lora("Qwen3ForSequenceClassification")  # made of Qwen3ForCausalLM
        True
    """
    names = [architecture]
    if architecture.endswith(_CLASSIFIER):
        names += [architecture.removesuffix(_CLASSIFIER) + ending for ending in _ENDINGS]
    return next((_LORA[name] for name in names if name in _LORA), None)
