"""The networks that the scorers take where none is named: names on the Hub. It imports nothing, so that `emf evaluate
--help` has them without torch."""

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
BLIP = "Salesforce/blip-vqa-base"
PICK, PICK_TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
