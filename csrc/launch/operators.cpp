// What Python calls: open, prepare and release once through C, launch on every call through two operators.
#include <algorithm>
#include <cstring>
#include <shared_mutex>

#include "known.h"

namespace lora_kernels {
namespace launch {

namespace {

struct Passes {
    std::shared_mutex mutex;
    std::shared_ptr<const Driver> driver;
    std::unordered_map<int64_t, std::shared_ptr<const Pass>> found;
    int64_t last = 0;
    std::unordered_map<int64_t, std::shared_ptr<KnownPasses>> known;  // by their tables' numbers
};

// Never destroyed: a thread may launch while the process ends.
Passes& passes() {
    static Passes* const all = new Passes;
    return *all;
}

std::shared_ptr<const Pass> pass_of(int64_t handle) {
    Passes& all = passes();
    const std::shared_lock<std::shared_mutex> lock(all.mutex);
    const auto found = all.found.find(handle);
    if (found == all.found.end()) throw Refusal("there is no prepared pass " + std::to_string(handle) + ".");
    return found->second;
}

using Given = std::optional<Tensor>;

std::vector<const Given*> pointers(const std::vector<Given>& tensors) {
    std::vector<const Given*> found;
    found.reserve(tensors.size());
    for (const Given& tensor : tensors) found.push_back(&tensor);
    return found;
}

// The usual call: one number, which a pass without numbers leaves, and at most eight tensors. Fixed arguments cost a
// microsecond less than lists.
std::vector<Tensor> launch(int64_t handle, double number, const Given& a, const Given& b, const Given& c,
                           const Given& d, const Given& e, const Given& f, const Given& g, const Given& h) {
    const std::shared_ptr<const Pass> pass = pass_of(handle);
    const Given* const tensors[] = {&a, &b, &c, &d, &e, &f, &g, &h};
    const size_t count = std::min(pass->tensors.size(), sizeof tensors / sizeof tensors[0]);
    for (size_t i = count; i < sizeof tensors / sizeof tensors[0]; ++i) {
        if (tensors[i]->has_value()) throw Refusal("the pass is for " + std::to_string(count) + " tensors; got more.");
    }
    return run(*pass, tensors, count, &number, pass->number_count == 0 ? 0 : 1);
}

std::vector<Tensor> launch_many(int64_t handle, const std::vector<double>& numbers, const std::vector<Given>& tensors) {
    const std::shared_ptr<const Pass> pass = pass_of(handle);
    const std::vector<const Given*> given = pointers(tensors);
    return run(*pass, given.data(), given.size(), numbers.data(), numbers.size());
}

std::shared_ptr<KnownPasses> known_in(int64_t table) {
    Passes& all = passes();
    const std::shared_lock<std::shared_mutex> lock(all.mutex);
    const auto found = all.known.find(table);
    return found == all.known.end() ? nullptr : found->second;
}

// The usual call again, of the pass that the table knows by the tensors; no results where it knows none.
std::vector<Tensor> launch_known(int64_t table, double number, double p, int64_t kind, const Given& a, const Given& b,
                                 const Given& c, const Given& d, const Given& e, const Given& f, const Given& g,
                                 const Given& h) {
    const std::shared_ptr<KnownPasses> known = known_in(table);
    const Given* const tensors[] = {&a, &b, &c, &d, &e, &f, &g, &h};
    if (known == nullptr) return {};
    return known->run(&number, 1, p, kind, tensors, sizeof tensors / sizeof tensors[0]);
}

std::vector<Tensor> launch_known_many(int64_t table, const std::vector<double>& numbers, double p, int64_t kind,
                                      const std::vector<Given>& tensors) {
    const std::shared_ptr<KnownPasses> known = known_in(table);
    if (known == nullptr) return {};
    const std::vector<const Given*> given = pointers(tensors);
    return known->run(numbers.data(), numbers.size(), p, kind, given.data(), given.size());
}

// Has the table know a pass by such tensors, which are what it was prepared for; False where it cannot.
bool enter_pass(int64_t table, int64_t handle, double p, int64_t kind, bool eager_only, int64_t of_rows,
                const std::vector<Given>& absent, const std::vector<Given>& tensors) {
    const std::shared_ptr<const Pass> pass = pass_of(handle);
    const auto missing =
        std::count_if(absent.begin(), absent.end(), [](const Given& each) { return each.has_value(); });
    if (pass->tensors.size() > tensors.size() || pass->results.size() + static_cast<size_t>(missing) != absent.size()) {
        throw Refusal("the pass has other tensors or results than it is to be known by.");
    }
    Key key(p, kind);
    const std::vector<const Given*> given = pointers(tensors);
    if (!key.add(given.data(), given.size())) return false;
    Passes& all = passes();
    std::shared_ptr<KnownPasses> known;
    {
        const std::unique_lock<std::shared_mutex> lock(all.mutex);
        std::shared_ptr<KnownPasses>& found = all.known[table];
        if (found == nullptr) found = std::make_shared<KnownPasses>();
        known = found;
    }
    known->enter(key, {pass, eager_only, absent, static_cast<size_t>(of_rows)});
    return true;
}

// What `work` returns; -1, and the sentence in `message`, where it throws.
template <class Work>
int64_t guarded(char* message, int64_t size, Work work) {
    try {
        return work();
    } catch (const std::exception& error) {
        std::strncpy(message, error.what(), static_cast<size_t>(size) - 1);
        message[size - 1] = '\0';
        return -1;
    }
}

}  // namespace
}  // namespace launch
}  // namespace lora_kernels

using namespace lora_kernels::launch;

#define LORA_EXPORT extern "C" __attribute__((visibility("default")))

// Finds the entry points; passes that are prepared from now on use them.
LORA_EXPORT int64_t lora_launch_open(const char* driver, const char* torch_cuda, char* message, int64_t size) {
    return guarded(message, size, [&] {
        const std::shared_ptr<const Driver> found = open_driver(driver, torch_cuda);
        Passes& all = passes();
        const std::unique_lock<std::shared_mutex> lock(all.mutex);
        all.driver = found;
        return int64_t{0};
    });
}

// A handle for the pass that `words` describe, above 0.
LORA_EXPORT int64_t lora_launch_prepare(const int64_t* words, int64_t count, char* message, int64_t size) {
    return guarded(message, size, [&] {
        Passes& all = passes();
        std::shared_ptr<const Driver> driver;
        {
            const std::shared_lock<std::shared_mutex> lock(all.mutex);
            driver = all.driver;
        }
        if (driver == nullptr) throw Refusal("the launcher was not opened.");
        const auto pass = std::make_shared<const Pass>(driver, words, count);
        const std::unique_lock<std::shared_mutex> lock(all.mutex);
        all.found.emplace(++all.last, pass);
        return all.last;
    });
}

// A call that runs the pass at this moment keeps it until its end.
LORA_EXPORT void lora_launch_release(int64_t handle) {
    Passes& all = passes();
    const std::unique_lock<std::shared_mutex> lock(all.mutex);
    all.found.erase(handle);
}

// The table knows nothing any more; a call that runs at this moment goes on.
LORA_EXPORT void lora_launch_forget(int64_t table) {
    Passes& all = passes();
    const std::unique_lock<std::shared_mutex> lock(all.mutex);
    all.known.erase(table);
}

// How many passes there are: for tests.
LORA_EXPORT int64_t lora_launch_count() {
    Passes& all = passes();
    const std::shared_lock<std::shared_mutex> lock(all.mutex);
    return static_cast<int64_t>(all.found.size());
}

STABLE_TORCH_LIBRARY_FRAGMENT(lora_kernels, m) {
    m.def(
        "launch(int handle, float number, Tensor? a=None, Tensor? b=None, Tensor? c=None, Tensor? d=None, "
        "Tensor? e=None, Tensor? f=None, Tensor? g=None, Tensor? h=None) -> Tensor[]");
    m.def("launch_many(int handle, float[] numbers, Tensor?[] tensors) -> Tensor[]");
    m.def(
        "launch_known(int table, float number, float p, int kind, Tensor? a=None, Tensor? b=None, Tensor? c=None, "
        "Tensor? d=None, Tensor? e=None, Tensor? f=None, Tensor? g=None, Tensor? h=None) -> Tensor[]");
    m.def("launch_known_many(int table, float[] numbers, float p, int kind, Tensor?[] tensors) -> Tensor[]");
    m.def(
        "enter_pass(int table, int handle, float p, int kind, bool eager_only, int of_rows, Tensor?[] absent, "
        "Tensor?[] tensors) -> bool");
}

// For every device: a pass checks its tensors itself, and the host's tests run it on the CPU's memory.
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
    m.impl("launch", TORCH_BOX(&launch));
    m.impl("launch_many", TORCH_BOX(&launch_many));
    m.impl("launch_known", TORCH_BOX(&launch_known));
    m.impl("launch_known_many", TORCH_BOX(&launch_known_many));
    m.impl("enter_pass", TORCH_BOX(&enter_pass));
}
