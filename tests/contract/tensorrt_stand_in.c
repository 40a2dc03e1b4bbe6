/*
 * Stand-ins for TensorRT's three libraries, with which Torch-TensorRT imports on a machine that has neither TensorRT
 * nor a GPU. They export what the wheels link to and do nothing. The one call that matters, the request for a
 * builder, prints a line and ends the process with a code of its own: "everything before TensorRT itself worked".
 * With TENSORRT_WITHOUT_BUILDER in the environment it is refused with a null pointer.
 *
 * One library is built from each part: -DPART_NVINFER, -DPART_PLUGIN, -DPART_PARSER. TENSORRT_VERSION is the
 * integer of the version that they claim to be (101200 for 10.12.0).
 */
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#if defined(PART_NVINFER)

#define BUILDER_MARKER "stand-in: TensorRT was asked for a builder\n"
#define BUILDER_EXIT_CODE 86

static intptr_t one(void) { return 1; }

/* A C++ object without data: its first word points to its table of virtual functions, each of which returns 1. */
#define FOUR one, one, one, one
#define SIXTEEN FOUR, FOUR, FOUR, FOUR
static intptr_t (*const virtual_functions[])(void) = {SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN};
static const void *registry = virtual_functions;

EXPORT void *getPluginRegistry(void) { return &registry; }
EXPORT void *getBuilderPluginRegistry(int32_t capability) { (void)capability; return &registry; }
EXPORT void *getLogger(void) { return 0; }
EXPORT int32_t getInferLibVersion(void) { return TENSORRT_VERSION; }
EXPORT void *createInferRuntime_INTERNAL(void *logger, int32_t version) { (void)logger; (void)version; return 0; }
EXPORT void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t version) {
    (void)engine; (void)logger; (void)version;
    return 0;
}
EXPORT void *createInferBuilder_INTERNAL(void *logger, int32_t version) {
    (void)logger; (void)version;
    if (getenv("TENSORRT_WITHOUT_BUILDER")) return 0; /* as on a full GPU */
    if (write(STDOUT_FILENO, BUILDER_MARKER, sizeof BUILDER_MARKER - 1) < 0) _exit(1);
    _exit(BUILDER_EXIT_CODE);
}

#elif defined(PART_PLUGIN)

EXPORT int initLibNvInferPlugins(void *logger, const char *names) { (void)logger; (void)names; return 1; }

#elif defined(PART_PARSER)

EXPORT void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) {
    (void)network; (void)logger; (void)version;
    return 0;
}
EXPORT void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) {
    (void)refitter; (void)logger; (void)version;
    return 0;
}
EXPORT int getNvOnnxParserVersion(void) { return TENSORRT_VERSION; }

#else
#error "name the library to build: -DPART_NVINFER, -DPART_PLUGIN or -DPART_PARSER"
#endif
