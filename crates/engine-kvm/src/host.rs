//! [`KvmHost`]: what `/dev/kvm` of this host is and can do, or why it is of no use.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::sync::Mutex;
use wardian_cpu::{Carrier, HostCpuid, Offer};
use wardian_time::TimeBase;

use crate::sys;

/// The device.
pub const DEVICE: &str = "/dev/kvm";
const API_VERSION: i32 = 12;

/// Why this host's KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is none.
    #[error(
        "There is no {DEVICE}: no virtualization hardware, or its kernel module (kvm_intel, kvm_amd) is not loaded"
    )]
    NoDevice,
    /// It may not be opened.
    #[error("No permission to open {DEVICE}: the user must be in its group (often 'kvm'), or root")]
    Permission,
    /// It cannot be opened.
    #[error("Could not open {DEVICE}: {0}")]
    Open(io::Error),
    /// Another interface.
    #[error("{DEVICE} speaks version {0} of the interface, not 12")]
    Version(i32),
    /// It lacks something.
    #[error("KVM of this host's kernel lacks: {0} (Linux 5.16 has all that is needed)")]
    Capabilities(String),
    /// A call failed.
    #[error("KVM refused {what}: {source}")]
    Call {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl KvmError {
    pub(crate) fn call(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
        move |e| KvmError::Call { what, source: io::Error::from_raw_os_error(e.errno()) }
    }
}

/// An open `/dev/kvm` that has what the engine needs.
pub struct KvmHost {
    pub(crate) kvm: Kvm,
    cpuid: HostCpuid,
    /// A virtual machine that was made to ask it something, and serves as the first that is needed.
    spare: Mutex<Option<VmFd>>,
}

/// The capabilities that the engine needs, by the names of the KVM API.
const NEEDED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Debugregs, "DEBUGREGS"),
    (Cap::Xsave, "XSAVE"),
    (Cap::Xcrs, "XCRS"),
    (Cap::SetGuestDebug, "SET_GUEST_DEBUG"),
    (Cap::UserNmi, "USER_NMI"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::X86UserSpaceMsr, "X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "X86_MSR_FILTER"),
];

impl KvmHost {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// When it is not there, may not be used, or lacks something: what, in one line.
    pub fn open() -> Result<KvmHost, KvmError> {
        Self::open_at(Path::new(DEVICE))
    }

    fn open_at(path: &Path) -> Result<KvmHost, KvmError> {
        let file =
            std::fs::OpenOptions::new().read(true).write(true).open(path).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => KvmError::NoDevice,
                io::ErrorKind::PermissionDenied => KvmError::Permission,
                _ if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => KvmError::NoDevice,
                _ => KvmError::Open(e),
            })?;
        let fd = OwnedFd::from(file);
        #[allow(unsafe_code)]
        // SAFETY: the descriptor was just opened and is handed over whole.
        let kvm = unsafe { Kvm::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd)) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        let missing: Vec<&str> =
            NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            return Err(KvmError::Capabilities(missing.join(", ")));
        }
        let answers = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("to say what CPUID can be"))?;
        let mut cpuid: Vec<_> = answers
            .as_slice()
            .iter()
            .map(|entry| ((entry.function, entry.index), [entry.eax, entry.ebx, entry.ecx, entry.edx]))
            .collect();
        // The vendor and the signature of the processor itself.
        let own = HostCpuid::read();
        cpuid.push(((0, 0), own.get(0, 0)));
        let host = KvmHost { kvm, cpuid: HostCpuid::from_answers(cpuid), spare: Mutex::new(None) };
        let vm = host.create_vm()?;
        // The host's kernel has measured its TSC with more patience than we have.
        if let Some(khz) = sys::tsc_khz(&vm) {
            wardian_time::state_host_hz(khz * 1000);
        }
        *host.spare() = Some(vm);
        Ok(host)
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Option<VmFd>> {
        self.spare.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A virtual machine without anything.
    pub(crate) fn create_vm(&self) -> Result<VmFd, KvmError> {
        if let Some(vm) = self.spare().take() {
            return Ok(vm);
        }
        self.kvm.create_vm().map_err(KvmError::call("to make a virtual machine"))
    }

    /// Whether the processor says that it has virtualization extensions (VT-x, SVM): a quick look, no proof.
    #[must_use]
    pub fn has_extensions() -> bool {
        let own = HostCpuid::read();
        own.get(1, 0)[2] >> 5 & 1 != 0 || own.get(0x8000_0001, 0)[2] >> 2 & 1 != 0
    }

    /// What CPUID can be for a guest here, for [`wardian_cpu::CpuModel::from_host`].
    #[must_use]
    pub fn cpuid(&self) -> &HostCpuid {
        &self.cpuid
    }

    /// What the engine can carry.
    #[must_use]
    pub fn offer(&self, time: &TimeBase) -> Offer {
        Offer { carrier: Carrier::Hardware, avx512: true, tsc_hz: time.tsc_hz() }
    }

    /// The most vCPUs of one machine.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }
}

impl std::fmt::Debug for KvmHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmHost").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_its_own_words() {
        let at = |path: &str| KvmHost::open_at(Path::new(path)).map(drop).map_err(|e| e.to_string());
        assert!(at("/nowhere/kvm").unwrap_err().starts_with("There is no /dev/kvm"));
        let error = at("/dev/null").unwrap_err();
        assert!(error.contains("version"), "{error}");
        assert!(at("/").unwrap_err().starts_with("Could not open"));
    }
}
