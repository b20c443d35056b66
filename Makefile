# make                  builds ./train_gpt2 (CPU backend; see docs/building.md for the variables below)
# make demo             installs what is missing, builds, trains a small GPT-2 with Flora on text found here, samples from it
# make test             installs what is missing, builds, runs every test, ends with "N passed, N failed"
# make bench            speed of the trainer and of each operation, as ratios of what this machine can do
# make format lint      clang-format over the sources; the check that CI runs
# make clean

CXX      ?= g++
CPU_ARCH ?= native
BLAS     ?= openblas
PYTHON   ?= .venv/bin/python
BUILD    ?= build
SANITIZE ?=

WARNINGS := -Wall -Wextra -Werror
CXXFLAGS := -std=c++20 -O3 -march=$(CPU_ARCH) -ffp-contract=off -fno-math-errno -fopenmp -g1 $(WARNINGS) -I.
LDLIBS   := -l$(BLAS) -lz -lgomp -lpthread
ifneq ($(SANITIZE),)
  CXXFLAGS += -fsanitize=$(SANITIZE) -fno-omit-frame-pointer
  LDFLAGS  += -fsanitize=$(SANITIZE)
endif

LIB_SOURCES  := $(wildcard kernels/*.cpp kernels/cpu/*.cpp flora/*.cpp model/*.cpp train/*.cpp data/*.cpp)
LIB_OBJECTS  := $(LIB_SOURCES:%.cpp=$(BUILD)/%.o)
TEST_SOURCES := $(wildcard tests/test_*.cpp)
TESTS        := $(TEST_SOURCES:tests/%.cpp=$(BUILD)/tests/%)
LIB          := $(BUILD)/libtrain_gpt2.a

all: train_gpt2

train_gpt2: $(BUILD)/train_gpt2.o $(LIB)
	$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(LIB): $(LIB_OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/train_gpt2.o: train_gpt2.cu
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -c -x c++ -o $@ $<

$(BUILD)/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(LIB)
	$(CXX) $(LDFLAGS) -o $@ $^ -lgtest -lgtest_main $(LDLIBS)

tests: $(TESTS)

clean:
	rm -rf $(BUILD) train_gpt2

.PHONY: all tests clean
.SECONDARY:

-include $(LIB_OBJECTS:.o=.d) $(TEST_SOURCES:%.cpp=$(BUILD)/%.d) $(BUILD)/train_gpt2.d
