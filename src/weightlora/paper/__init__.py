"""Tables and figures of the WeightLoRA paper: studies as YAML files, run by the bench engine and drawn."""
