//! The processor of the host: the engine over `/dev/kvm`.
//!
//! *Comes in*: guest RAM, a time base, a processor model, interrupts. *Goes out*: vCPUs ([`wardian_cpu::Vcpu`]) that
//! return the same [`wardian_cpu::Exit`] values as the software engine's.
//!
//! KVM runs instructions and page tables; everything around the processor stays ours, the local APIC included
//! ([`wardian_irq::LocalInterrupts`], as with the software engine): so ticks, their policies and saved states are the
//! same on both. The clock that the guest reads is the time base's: the TSC offset of every vCPU is set exactly, and
//! the kvmclock records are written by us.
//!
//! **Architecture Invariant:** no `kvm_*` type leaves this room. **Architecture Invariant:** a kick is never lost: it
//! raises `immediate_exit`, which the kernel reads when KVM_RUN begins, and sends a signal if the thread is inside.
//! **Architecture Invariant:** what KVM has begun (I/O, MMIO, an MSR) is completed before anything else is asked of
//! the vCPU.
//!
//! **API Boundary:** [`KvmHost`], [`KvmEngine`].

mod cpuid;
mod debug;
mod host;
mod msrs;
mod probe;
mod state;
mod sys;
#[cfg(test)]
mod tests;
mod vcpu;

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use wardian_cpu::{Activity, CpuModel, CpuState, Engine, EngineError, Vcpu};
use wardian_irq::LocalInterrupts;
use wardian_memory::{Gpa, GuestMemory, PAGE_SIZE};
use wardian_time::TimeBase;

pub use host::{DEVICE, KvmError, KvmHost};
pub use probe::Probe;

/// Pages that KVM wants for itself on Intel processors without unrestricted guest mode: below the firmware's place at
/// the end of 4 GiB, where nothing else of the machine lies.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TASK_STATE: usize = 0xfffb_d000;

impl From<KvmError> for EngineError {
    fn from(error: KvmError) -> EngineError {
        EngineError::Host(error.to_string())
    }
}

/// What the vCPUs of one machine share.
pub(crate) struct Shared {
    pub(crate) vm: VmFd,
    pub(crate) memory: GuestMemory,
    pub(crate) time: Arc<TimeBase>,
    pub(crate) run_size: usize,
    cpus: usize,
}

/// The engine of one machine.
pub struct KvmEngine(Arc<Shared>);

impl KvmEngine {
    /// An engine for `cpus` vCPUs over `memory` and `time`.
    ///
    /// # Errors
    /// When the host refuses something, or `time` is one that the host's processor cannot show.
    pub fn new(
        host: &KvmHost,
        memory: GuestMemory,
        time: Arc<TimeBase>,
        cpus: usize,
    ) -> Result<Arc<KvmEngine>, EngineError> {
        if time.tsc_offset().is_none() {
            let what = "KVM cannot show the time that is asked for (--time virtual, --tsc-mode emulate, or a timer policy \
                        that delays clocks): the software engine can";
            return Err(EngineError::Host(what.into()));
        }
        if cpus > host.max_vcpus() {
            return Err(EngineError::Host(format!("KVM runs at most {} vCPUs here", host.max_vcpus())));
        }
        sys::install_kick_signal()
            .map_err(|source| KvmError::Call { what: "the signal that kicks vCPUs", source })?;
        let vm = host.create_vm()?;
        vm.set_identity_map_address(IDENTITY_MAP).map_err(KvmError::call("the place of its page tables"))?;
        vm.set_tss_address(TASK_STATE).map_err(KvmError::call("the place of its task state"))?;
        let reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN;
        vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [u64::from(reasons), 0, 0, 0],
            ..Default::default()
        })
        .map_err(KvmError::call("to hand on model-specific registers"))?;
        msrs::filter(&vm)?;
        let run_size = host.kvm.get_vcpu_mmap_size().map_err(KvmError::call("the size of a run page"))?;
        let shared = Shared { vm, memory, time, run_size, cpus: cpus.max(1) };
        shared.map(false)?;
        Ok(Arc::new(KvmEngine(Arc::new(shared))))
    }

    /// From now on the pages that vCPUs write are noted, or no longer.
    ///
    /// # Errors
    /// When the kernel has no memory for that.
    pub fn log_dirty(&self, on: bool) -> Result<(), EngineError> {
        Ok(self.0.map(on)?)
    }

    /// The RAM pages (bit n of word m: RAM page 64 m + n, low RAM first) that vCPUs wrote since the last call.
    ///
    /// # Errors
    /// When they are not noted.
    pub fn take_dirty(&self) -> Result<Vec<u64>, EngineError> {
        let mut all = Vec::new();
        let mut pages = 0;
        for (slot, range) in self.0.memory.ranges().into_iter().enumerate() {
            let size = range.end - range.start;
            let log = self
                .0
                .vm
                .get_dirty_log(slot as u32, size as usize)
                .map_err(KvmError::call("to say which pages were written"))?;
            append_bits(&mut all, &mut pages, &log, (size / PAGE_SIZE) as usize);
        }
        Ok(all)
    }
}

/// Appends the first `count` bits of `bits` to `all`, which has `len` so far.
fn append_bits(all: &mut Vec<u64>, len: &mut usize, bits: &[u64], count: usize) {
    for n in (0..count).filter(|n| bits.get(n / 64).is_some_and(|word| word >> (n % 64) & 1 != 0)) {
        let at = *len + n;
        if all.len() <= at / 64 {
            all.resize(at / 64 + 1, 0);
        }
        all[at / 64] |= 1 << (at % 64);
    }
    *len += count;
    all.resize(len.div_ceil(64), 0);
}

impl Shared {
    /// Makes guest RAM the VM's.
    fn map(&self, log_dirty: bool) -> Result<(), KvmError> {
        for (slot, range) in self.memory.ranges().into_iter().enumerate() {
            let Some((_, host)) = self.memory.page(Gpa(range.start)) else { continue };
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: range.start,
                memory_size: range.end - range.start,
                userspace_addr: host as u64,
            };
            #[allow(unsafe_code)]
            // SAFETY: the range is one mapping of the guest's memory, which `self` keeps alive as long as the VM, and
            // which is shared with the guest in any case.
            unsafe {
                self.vm.set_user_memory_region(region).map_err(KvmError::call("guest memory"))?;
            }
        }
        Ok(())
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(
        &self,
        index: usize,
        model: &Arc<CpuModel>,
        interrupts: Arc<dyn LocalInterrupts>,
    ) -> Result<Box<dyn Vcpu>, EngineError> {
        let shared = &self.0;
        let fd = shared.vm.create_vcpu(index as u64).map_err(KvmError::call("to make a vCPU"))?;
        if !sys::has_tsc_offset(&fd) {
            return Err(KvmError::Capabilities("VCPU_TSC_OFFSET".into()).into());
        }
        let table = cpuid::table(model, index, shared.cpus)
            .map_err(|e| EngineError::Host(format!("the processor model has too many leaves: {e:?}")))?;
        fd.set_cpuid2(&table).map_err(KvmError::call("the processor model"))?;
        let mut vcpu = vcpu::KvmVcpu::new(Arc::clone(shared), index, fd, Arc::clone(model), interrupts)?;
        let mut reset = CpuState::reset();
        reset.gpr[2] = u64::from(model.signature());
        if index != 0 {
            reset.activity = Activity::WaitForSipi;
        }
        vcpu.set_state(&reset)?;
        Ok(Box::new(vcpu))
    }
}

#[cfg(test)]
mod pure {
    use super::append_bits;

    #[test]
    fn dirty_bits_of_regions_follow_each_other() {
        let (mut all, mut len) = (Vec::new(), 0);
        append_bits(&mut all, &mut len, &[1 << 3, 1 << 5], 70);
        append_bits(&mut all, &mut len, &[0b11], 60);
        assert_eq!((all, len), (vec![1 << 3, 1 << 5 | 0b11 << 6, 0], 130));
    }
}
