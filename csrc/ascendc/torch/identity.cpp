// What this library was built from: another release, or other sources, may have other operators, layouts and options.
// moe_fx/ascend_library.py looks for it in the file, before anything of it is loaded.

extern "C" {
[[gnu::used, gnu::visibility("default")]] extern const char moe_fx_ascendc_identity[] =
    "moe-fx " MOE_FX_VERSION " with kernel sources " MOE_FX_SOURCES;
}
