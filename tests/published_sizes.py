"""Numbers of parameters as published, for networks of 1000 and of 10 classes."""

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
}
PUBLISHED_FOR_CIFAR = {
    "wide_resnet28_10": 36_479_194,
    "wide_resnet40_4": 8_949_210,
    "wide_resnet16_4": 2_748_890,
    "resnet9": 6_573_120,
}
