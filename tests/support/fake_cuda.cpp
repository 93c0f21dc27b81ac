// Lets fake CUDA tensors (FakeTensorMode) go through forward and backward where there is no CUDA.
//
// A CPU build of torch has no device guard for CUDA, and autograd asks for an accelerator; a CUDA
// build without a driver fails at hasPrimaryContext. Nothing here computes or allocates anything.
// It is loaded before torch is imported (tests/fake_cuda_trace.py): torch looks for hooks once.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

struct FakeCudaGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

// called once torch is there: the guard of a CUDA build has taken the place by then
extern "C" void register_guard() {
  static DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new FakeCudaGuard);
}

}  // namespace c10::impl

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  void init() const override {}
};

// ahead of the hooks of a CUDA build
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, REGISTRY_PREFERRED, CUDAHooks);

}  // namespace at
