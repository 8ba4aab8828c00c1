//! What kvm-ioctls does not wrap: the run page of a vCPU as the kicker needs it, attributes of vCPUs, injection
//! of an interrupt, the dirty log in pieces.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_CAP_VM_TSC_CONTROL, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_interrupt,
    kvm_run, kvm_run__bindgen_ty_1,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

vmm_sys_util::ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);
vmm_sys_util::ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);

/// The page (or pages) that a vCPU shares with the kernel, mapped once more than kvm-ioctls does, so that it
/// outlives the vCPU where a kicker still holds it.
pub(crate) struct RunPage {
    at: *mut kvm_run,
    size: usize,
}

// SAFETY: the mapping is shared memory; every access goes through the methods below and is volatile or atomic. The
// kicker touches `immediate_exit` alone, which is atomic; all other fields are touched only by whoever has the vCPU.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

/// Why KVM_RUN came back, as the kernel wrote it.
pub(crate) type Reason = kvm_run__bindgen_ty_1;

impl RunPage {
    pub(crate) fn map(vcpu: &VcpuFd, size: usize) -> io::Result<RunPage> {
        if size < size_of::<kvm_run>() {
            return Err(io::Error::other("the run page is too small"));
        }
        // SAFETY: a new mapping of the vCPU's descriptor at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(RunPage { at: at.cast(), size })
    }

    /// "Come back at once": read by the kernel when KVM_RUN begins.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the field is a byte of the mapping, which lives as long as `self`; nobody accesses it otherwise.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.at).immediate_exit) }
    }

    pub(crate) fn exit_reason(&self) -> u32 {
        // SAFETY: within the mapping; the kernel writes it only inside KVM_RUN.
        unsafe { (&raw const (*self.at).exit_reason).read_volatile() }
    }

    /// RFLAGS.IF at the last exit.
    pub(crate) fn interrupts_enabled(&self) -> bool {
        // SAFETY: as above.
        unsafe { (&raw const (*self.at).if_flag).read_volatile() != 0 }
    }

    /// An interrupt can be injected now.
    pub(crate) fn ready(&self) -> bool {
        // SAFETY: as above.
        unsafe { (&raw const (*self.at).ready_for_interrupt_injection).read_volatile() != 0 }
    }

    /// Come back as soon as an interrupt can be injected.
    pub(crate) fn want_window(&self, wanted: bool) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.at).request_interrupt_window).write_volatile(u8::from(wanted)) }
    }

    pub(crate) fn cr8(&self) -> u8 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.at).cr8).read_volatile() as u8 & 15 }
    }

    pub(crate) fn set_cr8(&self, value: u8) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.at).cr8).write_volatile(u64::from(value & 15)) }
    }

    /// What belongs to the exit reason: the member of the union that it names.
    pub(crate) fn reason(&self) -> Reason {
        // SAFETY: as above; the union is plain data.
        unsafe { (&raw const (*self.at).__bindgen_anon_1).read_volatile() }
    }

    pub(crate) fn set_reason(&self, reason: Reason) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.at).__bindgen_anon_1).write_volatile(reason) }
    }

    /// `len` bytes (at most 8) at `offset` of the mapping, little endian; zero when they are not inside.
    pub(crate) fn data(&self, offset: u64, len: usize) -> u64 {
        let mut out = [0u8; 8];
        if len <= 8 && offset.checked_add(len as u64).is_some_and(|end| end <= self.size as u64) {
            // SAFETY: checked to be inside the mapping; the kernel writes it only inside KVM_RUN.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    self.at.cast::<u8>().add(offset as usize),
                    out.as_mut_ptr(),
                    len,
                );
            }
        }
        u64::from_le_bytes(out)
    }

    pub(crate) fn set_data(&self, offset: u64, len: usize, value: u64) {
        if len <= 8 && offset.checked_add(len as u64).is_some_and(|end| end <= self.size as u64) {
            let bytes = value.to_le_bytes();
            // SAFETY: checked to be inside the mapping.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.cast::<u8>().add(offset as usize), len);
            }
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, with this size, and nobody has a reference any more.
        unsafe { libc::munmap(self.at.cast(), self.size) };
    }
}

fn done(ret: i32) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// KVM_RUN; the exit is in the run page.
pub(crate) fn run(vcpu: &VcpuFd) -> io::Result<()> {
    // SAFETY: the descriptor is a vCPU's; guest memory and run page live as long as the vCPU.
    done(unsafe { ioctl_with_val(vcpu, KVM_RUN(), 0) })
}

/// Injects external interrupt `vector`, acknowledged already.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let arg = kvm_interrupt { irq: u32::from(vector) };
    // SAFETY: the kernel reads the struct.
    done(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &arg) })
}

/// Rate of the host's TSC as its kernel has it, if the kernel trusts it.
pub(crate) fn tsc_khz(vm: &VmFd) -> Option<u64> {
    if vm.check_extension_raw(KVM_CAP_VM_TSC_CONTROL.into()) <= 0 {
        return None;
    }
    // SAFETY: the descriptor is a VM's; there is no argument.
    let khz = unsafe { ioctl_with_val(vm, KVM_GET_TSC_KHZ(), 0) };
    u64::try_from(khz).ok().filter(|khz| *khz > 0)
}

fn tsc_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr }
}

/// Whether the TSC offset of a vCPU can be set exactly.
pub(crate) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    // SAFETY: the kernel reads the struct and no memory behind `addr`.
    done(unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &tsc_attribute(0)) }).is_ok()
}

/// Guest TSC = host TSC + `offset`.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = tsc_attribute(&raw const offset as u64);
    // SAFETY: the kernel reads the struct and the 8 bytes at `addr`, which is `offset`.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}

/// A signal that interrupts a system call of a thread and does nothing else.
pub(crate) fn kick_signal() -> i32 {
    libc::SIGRTMIN() + 3
}

extern "C" fn nothing(_: libc::c_int) {}

/// Lets [`kick_signal`] interrupt system calls instead of ending the process.
pub(crate) fn install_kick_signal() -> io::Result<()> {
    // SAFETY: a zeroed sigaction is valid; the handler is a function that does nothing, which is safe at any time.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigemptyset(&raw mut action.sa_mask);
        done(libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()))
    }
}

thread_local! {
    // SAFETY: no arguments, no memory.
    static THREAD: i32 = unsafe { libc::gettid() };
}

/// The calling thread's number.
pub(crate) fn this_thread() -> i32 {
    THREAD.with(|number| *number)
}

/// Sends [`kick_signal`] to thread `thread` of this process.
pub(crate) fn signal_thread(thread: i32) {
    // SAFETY: only threads of this process are addressed; a thread that is gone is an error that does not matter.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
}

/// "Come back at once" and the means to say it to a thread that is inside KVM_RUN.
pub(crate) struct Kicker {
    page: std::sync::Arc<RunPage>,
    /// The thread inside KVM_RUN, or 0.
    inside: std::sync::atomic::AtomicI32,
    /// The vCPU's thread while it looks at what waits, or 0: what it kicks itself for then it is about to see.
    looking: std::sync::atomic::AtomicI32,
}

impl Kicker {
    pub(crate) fn new(page: std::sync::Arc<RunPage>) -> Kicker {
        let nobody = || std::sync::atomic::AtomicI32::new(0);
        Kicker { page, inside: nobody(), looking: nobody() }
    }

    /// Thread `thread` is about to be inside KVM_RUN: from here on a kick sends a signal, and one from before is seen
    /// by the kernel in the run page. Both orders are total (SeqCst), so one of the two sees the other.
    pub(crate) fn enter(&self, thread: i32) {
        self.inside.store(thread, Ordering::SeqCst);
    }

    pub(crate) fn leave(&self) {
        self.inside.store(0, Ordering::SeqCst);
    }

    /// Thread `thread` looks at what waits (0: no longer).
    pub(crate) fn look(&self, thread: i32) {
        self.looking.store(thread, Ordering::Relaxed);
    }

    /// Takes a kick.
    pub(crate) fn take(&self) -> bool {
        let flag = self.page.immediate_exit();
        flag.load(Ordering::SeqCst) != 0 && flag.swap(0, Ordering::SeqCst) != 0
    }

    /// Makes the next KVM_RUN complete what it must and come back.
    pub(crate) fn set(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
    }
}

impl wardian_irq::Kick for Kicker {
    fn kick(&self) {
        // Only the thread itself reads its own number here.
        let looking = self.looking.load(Ordering::Relaxed);
        if looking != 0 && looking == this_thread() {
            return;
        }
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.inside.load(Ordering::SeqCst);
        if thread != 0 {
            signal_thread(thread);
        }
    }
}
