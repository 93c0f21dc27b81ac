"""The embedded corpus: real images and text from installed packages, as ordinary WebDataset tars;
with speech or with clips, another corpus that has one more source.

``builder.build_corpus`` writes, without a network and byte for byte the same each time,

    <folder>/train/{text,glyphs,digits,interleaved}/000000.tar …
    <folder>/validation/{text,glyphs,digits,interleaved}/000000.tar …
    <folder>/{train,validation}/speech/000000.tar …   with speech (speech.py)
    <folder>/{train,validation}/clips/000000.tar …    with clips (clips.py)
    <folder>/validation/tasks.json      checks on held-out images (tasks.py)
    <folder>/validation/prompts.json    held-out captions and their images (tasks.py)
    <folder>/corpus.json                specification, versions, counts
    <folder>/README.md                  sources and licences

Validation holds digits, typefaces, works of text and voices that training never shows.
"""
