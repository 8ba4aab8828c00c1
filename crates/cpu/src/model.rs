//! [`CpuModel`]: what CPUID says.

/// What an engine can carry, as a filter over the host's CPUID.
#[derive(Clone, Debug, Default)]
pub struct Offer {
    /// Whether AVX-512 state is carried.
    pub avx512: bool,
    /// Rate of the guest TSC in Hz, for leaf 15h and the hypervisor's timing leaf.
    pub tsc_hz: u64,
}

/// What the answer of CPUID depends on besides the model.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuidContext {
    /// Initial APIC ID of the vCPU.
    pub apic_id: u32,
    /// vCPUs of the machine.
    pub cpus: u32,
    /// XCR0 of the vCPU.
    pub xcr0: u64,
    /// CR4.OSXSAVE of the vCPU.
    pub osxsave: bool,
    /// The local APIC is enabled in `IA32_APIC_BASE`.
    pub apic_enabled: bool,
}

/// A processor model that cannot be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelError {
    /// No such model.
    #[error("Unknown processor model '{0}'")]
    UnknownModel(String),
    /// No such feature.
    #[error("Unknown processor feature '{0}'")]
    UnknownFeature(String),
    /// The host or the engine does not have it.
    #[error("Processor feature '{0}' is not available on this host with this engine")]
    Unavailable(String),
}

/// A named processor model: everything that CPUID answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// Name and version, such as `host-1`.
    pub name: String,
}
