"""The description of a package in Croissant 1.1 with its responsible-AI terms, for catalogs."""

import hashlib

from ..records import Json
from .archive import DATA

CONTEXT: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(manifest: Json, data: bytes) -> Json:
    """Return the description of a package from its manifest, and the bytes of its tensors."""
    card, made = manifest["card"], manifest["made"]
    count = sum(manifest["per_class"])
    shape = " x ".join(map(str, (card["channels"], *card["shape"])))
    about = (
        f"{count} synthetic images ({shape}) of {len(card['classes'])} classes, distilled from "
        f"{card['name']} by {made['method']}, with the recipe to train on them."
    )
    record: Json = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": manifest["name"],
        "description": about,
        "conformsTo": [
            "http://mlcommons.org/croissant/1.1",
            "http://mlcommons.org/croissant/RAI/1.0",
        ],
        "license": manifest["license"],
        "version": f"{manifest['counter']}.0.0",
        "keywords": ["dataset distillation", "synthetic", *filter(None, [card["modality"]])],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": DATA,
                "name": DATA,
                "contentUrl": DATA,
                "contentSize": f"{len(data)} B",
                "encodingFormat": "application/octet-stream",
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        ],
        "rai:dataCollection": f"Made from {card['name']}; no image is a patient's as it was taken."
        if not made["real_pixels"]
        else f"Images are, or started from, real images of {card['name']}.",
        "rai:dataLimitations": "Scores hold for the recipe, backbone and data in evaluation.json. "
        "Images show averages that train a network, not anatomy to diagnose from.",
        "rai:personalSensitiveInformation": "Made of patients' images: see privacy.json and "
        "REPORT.md.",
        "rai:dataUseCases": manifest["purpose"] or "Training of classifiers, as the recipe says.",
    }
    if card["citation"]:
        record["citeAs"] = card["citation"]
    if card["url"]:
        record["url"] = card["url"]
    return record
