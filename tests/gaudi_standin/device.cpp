// A device `hpu` for torch whose memory is host memory.
//
// Tensors on it are of torch's built-in key HPU: they have storages of their own, which are counted
// and limited, and mix with the CPU's no more than a real device's. Every operation runs torch's
// CPU kernel on the same memory. What it makes is handed over without a copy, and counted.
//
// A view is an HPU tensor on its base's storage, found by the storage that the CPU kernel returned.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/ops/_to_copy_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceType;

const Device kHpu(DeviceType::HPU, 0);

struct Counts {
  uint64_t limit, held, peak, pieces, allocations, to_host, to_device;
};

// Where the folder FAKEHPU_BOARD is given, the counts lie in a file there, named after the process:
// others may read them, and see whose they are.
Counts* counts_of_this_process() {
  const char* folder = std::getenv("FAKEHPU_BOARD");
  if (folder != nullptr) {
    std::string path = std::string(folder) + "/" + std::to_string(getpid());
    int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
    if (file >= 0 && ftruncate(file, sizeof(Counts)) == 0) {
      void* there = mmap(nullptr, sizeof(Counts), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
      close(file);
      if (there != MAP_FAILED) {
        return new (there) Counts{};
      }
    }
    TORCH_CHECK(false, "hpu: cannot write ", path, " (FAKEHPU_BOARD)");
  }
  return new Counts{};
}

// A Gaudi is of one process, from the first that it asks of the device to its end. With the folder
// FAKEHPU_BOARD there is one device for all that have it. The lock is not inherited by a fork, and
// goes with its process.
bool acquired() {
  static std::mutex asking;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> hold(asking);
  const char* folder = std::getenv("FAKEHPU_BOARD");
  if (std::getenv("FAKEHPU_ABSENT") != nullptr) {
    return false;
  }
  if (folder == nullptr || owner == getpid()) {
    return true;
  }
  std::string path = std::string(folder) + "/device";
  int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  TORCH_CHECK(file >= 0, "hpu: cannot write ", path, " (FAKEHPU_BOARD)");
  struct flock whole = {};
  whole.l_type = F_WRLCK;
  if (fcntl(file, F_SETLK, &whole) != 0) {
    close(file);
    return false;
  }
  owner = getpid();
  return true;
}

struct Books {
  std::mutex lock;
  Counts& counts;
  bool dirty = std::getenv("FAKEHPU_DIRTY") != nullptr;

  Books() : counts(*counts_of_this_process()) {
    const char* mib = std::getenv("FAKEHPU_MIB");
    counts.limit = (mib ? std::strtoull(mib, nullptr, 10) : 8192) << 20;
  }

  void take(uint64_t bytes) {
    TORCH_CHECK(acquired(), "synStatus=8 [Device not found] Device acquire failed.");  // as Intel says
    std::lock_guard<std::mutex> hold(lock);
    if (counts.held + bytes > counts.limit) {
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "hpu: out of memory: ", bytes, " bytes wanted, ",
          counts.limit - counts.held, " of ", counts.limit, " free");
    }
    counts.held += bytes;
    counts.peak = std::max(counts.peak, counts.held);
    counts.pieces += 1;
    counts.allocations += 1;
  }

  void give(uint64_t bytes) {
    std::lock_guard<std::mutex> hold(lock);
    counts.held -= bytes;
    counts.pieces -= 1;
  }
};

Books& books() {
  static Books* one = new Books();  // outlives every tensor
  return *one;
}

// One piece of device memory: where it came from, and its size in the books.
struct Piece {
  c10::DataPtr memory;
  uint64_t bytes;
};

void free_piece(void* context) {
  auto* piece = static_cast<Piece*>(context);
  books().give(piece->bytes);
  delete piece;
}

c10::DataPtr owned(c10::DataPtr memory, uint64_t bytes) {
  void* address = memory.get();
  return c10::DataPtr(address, new Piece{std::move(memory), bytes}, &free_piece, kHpu);
}

c10::DataPtr counted(c10::DataPtr memory, uint64_t bytes) {
  books().take(bytes);
  return owned(std::move(memory), bytes);
}

struct HpuAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return c10::DataPtr(nullptr, kHpu);
    }
    books().take(bytes);  // first: what is too large is not to be asked of the host
    c10::DataPtr memory;
    try {
      memory = c10::GetCPUAllocator()->allocate(bytes);
    } catch (...) {
      books().give(bytes);
      throw;
    }
    c10::DataPtr made = owned(std::move(memory), bytes);
    if (books().dirty) {
      std::memset(made.get(), 0xFF, bytes);  // not a number in every float type, -1 as an integer
    }
    return made;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

HpuAllocator allocator;
REGISTER_ALLOCATOR(DeviceType::HPU, &allocator);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::HPU> {
  Device exchangeDevice(Device) const override { return kHpu; }
  Device getDevice() const override { return kHpu; }
  c10::Stream getStream(Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kHpu);
  }
  c10::Stream getNewStream(Device, int) const override {
    return c10::Stream(c10::Stream::DEFAULT, kHpu);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kHpu);
  }
};
C10_REGISTER_GUARD_IMPL(HPU, Guard)

struct Hooks final : at::HPUHooksInterface {
  explicit Hooks(at::HPUHooksArgs = {}) {}
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return kHpu; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

bool on_hpu(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::HPU;
}

at::Tensor bare(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// A view has the keys of its base: one of a tensor from outside of inference mode is none of it.
at::Tensor view(const at::Tensor& like, const at::Tensor& base) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The CPU's names for device tensors during one call.
class Call {
 public:
  at::Tensor in(const at::Tensor& tensor) {
    if (!on_hpu(tensor)) {
      return tensor;
    }
    for (const auto& [ours, theirs] : tensors_) {
      if (ours.is_same(tensor)) {
        return theirs;
      }
    }
    auto theirs = bare(tensor, storage(tensor.storage()), c10::DispatchKey::CPU);
    tensors_.emplace_back(tensor, theirs);
    return theirs;
  }

  at::Tensor out(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != DeviceType::CPU) {
      return tensor;
    }
    for (const auto& [ours, theirs] : tensors_) {
      if (theirs.is_same(tensor)) {
        return ours;
      }
    }
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    for (const auto& [ours, theirs] : tensors_) {
      if (theirs.storage().unsafeGetStorageImpl() == impl) {
        return view(tensor, ours);
      }
    }
    for (const auto& [ours, theirs] : storages_) {  // made by this very call
      if (theirs.unsafeGetStorageImpl() == impl) {
        return bare(tensor, ours, c10::DispatchKey::HPU);
      }
    }
    c10::Storage taken = take(tensor.storage());
    storages_.emplace_back(taken, tensor.storage());
    return bare(tensor, taken, c10::DispatchKey::HPU);
  }

  // A kernel may have resized what it was given: give the new memory and shape to the original.
  void finish() {
    for (auto& [ours, theirs] : tensors_) {
      auto* from = theirs.storage().unsafeGetStorageImpl();
      auto* to = ours.storage().unsafeGetStorageImpl();
      if (from->data() != to->data()) {
        size_t bytes = from->nbytes();
        to->set_data_ptr_noswap(counted(from->set_data_ptr(c10::DataPtr()), bytes));
        to->set_nbytes(bytes);
      }
      if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides()) {
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(
            theirs.sizes(), theirs.strides(), theirs.storage_offset());
      }
    }
  }

 private:
  c10::Storage storage(const c10::Storage& ours) {
    for (const auto& [known, theirs] : storages_) {
      if (known.unsafeGetStorageImpl() == ours.unsafeGetStorageImpl()) {
        return theirs;
      }
    }
    auto theirs = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), ours.nbytes(),
        c10::DataPtr(const_cast<void*>(ours.data()), Device(DeviceType::CPU)),
        c10::GetCPUAllocator(), /*resizable=*/true));
    storages_.emplace_back(ours, theirs);
    return theirs;
  }

  // What a kernel has made becomes the device's. The kernel's tensor is left without memory.
  static c10::Storage take(const c10::Storage& theirs) {
    auto* impl = theirs.unsafeGetStorageImpl();
    size_t bytes = impl->nbytes();
    c10::DataPtr memory = bytes ? counted(impl->set_data_ptr(c10::DataPtr()), bytes)
                                : c10::DataPtr(nullptr, kHpu);
    return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), bytes, std::move(memory), &allocator, true));
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

template <typename F>
c10::IValue changed(const c10::IValue& value, F change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& each : value.toTensorVector()) {
      made.push_back(change(each));
    }
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (const auto& each : value.toOptionalTensorVector()) {
      made.push_back(each ? std::optional<at::Tensor>(change(*each)) : std::nullopt);
    }
    return made;
  }
  return value;
}

bool any_tensor_of_host(const c10::IValue& value) {
  return value.isTensor() && value.toTensor().defined() && value.toTensor().is_cpu() &&
      value.toTensor().dim() > 0;
}

// Operations for which a device accepts tensors of the host beside its own.
bool takes_host_tensors(const std::string& name) {
  for (const char* each : {"aten::copy_", "aten::_copy_from", "aten::index", "aten::_index_put",
                           "aten::set_", "c10d::", "aten::record_stream", "aten::_pin",
                           "aten::is_pinned", "aten::to", "aten::_has_compatible"}) {
    if (name.rfind(each, 0) == 0) {
      return true;
    }
  }
  return false;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const size_t base = stack->size() - count;
  Call call;
  bool ours = false, host = false;
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[base + i];
    host |= any_tensor_of_host(value);
    if (value.isDevice()) {
      if (value.toDevice().type() == DeviceType::HPU) {
        value = Device(DeviceType::CPU);
      }
      continue;
    }
    value = changed(value, [&](const at::Tensor& each) {
      ours |= on_hpu(each);
      return call.in(each);
    });
  }
  TORCH_CHECK(
      !(ours && host) || takes_host_tensors(schema.name()), schema.name(),
      ": expected all tensors to be on the same device, but found hpu:0 and cpu");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(*stack);
  }
  call.finish();
  const size_t results = schema.returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    (*stack)[i] = changed((*stack)[i], [&](const at::Tensor& each) { return call.out(each); });
  }
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  auto type = c10::scalarTypeToTypeMeta(dtype.value_or(c10::get_default_dtype_as_scalartype()));
  const size_t bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  auto storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true));
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::HPU), type);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pin,
    std::optional<at::MemoryFormat> format) {
  auto strides = c10::contiguous_strides(size);
  auto made = empty_strided(size, strides, dtype, layout, device, pin);
  if (format && *format != at::MemoryFormat::Contiguous && *format != at::MemoryFormat::Preserve) {
    made.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  }
  return made;
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  if (on_hpu(to) != on_hpu(from)) {
    std::lock_guard<std::mutex> hold(books().lock);
    (on_hpu(to) ? books().counts.to_device : books().counts.to_host) += from.numel() * from.element_size();
  }
  Call call;
  at::AutoDispatchBelowADInplaceOrView below;
  auto target = call.in(to);
  target.copy_(call.in(from));
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool wait) {
  at::Tensor target = to;
  return copy(target, from, wait);
}

const at::Tensor& resize(
    const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto strides = c10::contiguous_strides(size);
  auto* impl = self.unsafeGetTensorImpl();
  const size_t item = self.element_size();
  const size_t bytes = at::detail::computeStorageNbytes(size, strides, item, self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    c10::DataPtr larger = allocator.allocate(bytes);
    if (storage->nbytes()) {
      std::memcpy(larger.get(), storage->data(), storage->nbytes());
    }
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  impl->set_sizes_and_strides(size, strides);
  return self;
}

at::Tensor& set_all(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  TORCH_CHECK(source.device().type() == DeviceType::HPU, "hpu: set_: the storage is not on hpu");
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  auto strides = stride.empty() ? c10::contiguous_strides(size) : c10::DimVector(stride);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const int64_t items = source.nbytes() / self.element_size();
  return set_all(self, std::move(source), 0, {items}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_all(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_all(
      self,
      c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true)),
      0, {0}, {});
}

// Never "without waiting": for that torch pins the host's tensor by the device that torch was built
// for, which may be CUDA.
at::Tensor to_copy(
    const at::Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pin, bool,
    std::optional<at::MemoryFormat> format) {
  return at::native::_to_copy(self, dtype, layout, device, pin, /*non_blocking=*/false, format);
}

bool is_pinned(const at::Tensor&, std::optional<Device>) { return false; }
void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, HPU, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("_copy_from", &copy_from);
  m.impl("_to_copy", &to_copy);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_all);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("is_pinned", &is_pinned);
  m.impl("record_stream", &record_stream);
}

}  // namespace

namespace at {
REGISTER_HPU_HOOKS(Hooks)
}

extern "C" {
// limit, held, peak, pieces, allocations, bytes copied to the host and to the device
void fakehpu_read(uint64_t* out) {
  Books& all = books();
  std::lock_guard<std::mutex> hold(all.lock);
  std::memcpy(out, &all.counts, sizeof(Counts));
}
int fakehpu_acquire() { return acquired(); }
void fakehpu_reset_peak() {
  std::lock_guard<std::mutex> hold(books().lock);
  books().counts.peak = books().counts.held;
}
}
