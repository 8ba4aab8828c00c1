//! [`CpuModel`]: what CPUID says, and which control-register bits follow from it.
//!
//! The default is the host's CPUID minus what the engine cannot carry, plus what the engine makes by itself.
//! Speculation: the guest's kernel is told by `IA32_ARCH_CAPABILITIES` that the processor has none of the known
//! flaws, so that it takes no costly counter-measures inside a guest that is translated anyway. `IBRS_ALL` makes
//! Linux write `IA32_SPEC_CTRL` once (IBRS); see [`CpuModel::spec_ctrl_mask`]. Kernels of 2025 and later no longer
//! believe `BHI_NO` and run a loop of 60 branches at each system call, unless CPUID offers `BHI_DIS_S`: so it does.

mod features;
mod host;
mod leaves;
mod persist;
#[cfg(test)]
mod tests;

use features::TABLE;
pub use features::{Carry, Feature, FeatureSet, Place, Row, TABLE as FEATURES};
pub use host::HostCpuid;
pub use persist::ModelState;

use crate::bits::{cr4, efer};

/// How an engine runs guest instructions: what decides which features it can offer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carrier {
    /// It translates them, and makes the privileged ones itself ([`Carry`]).
    #[default]
    Translator,
    /// The host processor runs all of them; the host answers are what its hypervisor says it can give a guest.
    Hardware,
}

/// What an engine can carry, as a filter over the host's CPUID.
#[derive(Clone, Debug, Default)]
pub struct Offer {
    /// How instructions are run.
    pub carrier: Carrier,
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
    /// The host or the engine does not have them: their names, separated by commas.
    #[error("Not available on this host with this engine: {0}")]
    Unavailable(String),
    /// A `name=value` that is not understood.
    #[error("Bad processor option '{0}'")]
    BadOption(String),
}

/// Whose processor the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// `GenuineIntel`.
    Intel,
    /// `AuthenticAMD`.
    Amd,
    /// `HygonGenuine`, of AMD's design.
    Hygon,
    /// `CentaurHauls`, of Intel's design as far as CPUID goes.
    Centaur,
    /// `  Shanghai  ` (Zhaoxin), likewise.
    Zhaoxin,
}

const VENDORS: [(Vendor, &[u8; 12]); 5] = [
    (Vendor::Intel, b"GenuineIntel"),
    (Vendor::Amd, b"AuthenticAMD"),
    (Vendor::Hygon, b"HygonGenuine"),
    (Vendor::Centaur, b"CentaurHauls"),
    (Vendor::Zhaoxin, b"  Shanghai  "),
];

impl Vendor {
    /// The twelve letters of leaf 0.
    #[must_use]
    pub fn letters(self) -> [u8; 12] {
        *VENDORS[self as usize].1
    }

    /// Whether it follows AMD's design: its leaves, its SYSCALL, its segment loads.
    #[must_use]
    pub fn is_amd_like(self) -> bool {
        matches!(self, Vendor::Amd | Vendor::Hygon)
    }

    fn of(letters: &[u8]) -> Option<Vendor> {
        VENDORS.iter().find(|(_, known)| known.as_slice() == letters).map(|(vendor, _)| *vendor)
    }

    /// Leaf 1 EAX of a usual server processor, for models that do not follow the host.
    fn usual_signature(self) -> u32 {
        match self {
            Vendor::Intel => 0x0008_06f8,                  // Sapphire Rapids
            Vendor::Amd => 0x00a1_0f11,                    // Genoa
            Vendor::Hygon => 0x0090_0f02,                  // Dhyana
            Vendor::Centaur | Vendor::Zhaoxin => 0x7_05b0, // family 7
        }
    }
}

/// A named processor model: everything that CPUID answers. Immutable once made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// Name and version, such as `host-1`.
    pub name: String,
    vendor: Vendor,
    /// Leaf 1 EAX.
    signature: u32,
    features: FeatureSet,
    tsc_hz: u64,
    physical_bits: u32,
    brand: [u8; 48],
    /// Answers copied from the host (caches, TLBs, state component layout).
    copied: HostCpuid,
}

/// Microarchitecture levels of the x86-64 psABI, 3.1.1 "Processor Architecture": each adds to the one before.
const LEVELS: [(&str, &[&str]); 4] = [
    ("x86-64-v1", &["fpu", "cx8", "cmov", "clflush", "mmx", "fxsr", "sse", "sse2"]),
    ("x86-64-v2", &["pni", "ssse3", "sse4_1", "sse4_2", "cx16", "popcnt"]),
    ("x86-64-v3", &["xsave", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"]),
    ("x86-64-v4", &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
];

impl CpuModel {
    /// The model that `spec` names, for an engine that offers `offer` on the processor this runs on.
    ///
    /// `spec` is `host` or `x86-64-v1` to `-v4`, followed by any of `,+feature`, `,-feature` (names as in
    /// `/proc/cpuinfo`), `,vendor=AuthenticAMD`, `,family=N`, `,model=N`, `,stepping=N`. An invariant TSC
    /// (`invtsc`) is announced only if asked for.
    ///
    /// # Errors
    /// Names that do not exist; features that the host or the engine does not have.
    pub fn host(spec: &str, offer: &Offer) -> Result<CpuModel, ModelError> {
        Self::from_host(spec, offer, &HostCpuid::read())
    }

    /// The same over given host answers.
    ///
    /// # Errors
    /// As [`CpuModel::host`].
    pub fn from_host(spec: &str, offer: &Offer, host: &HostCpuid) -> Result<CpuModel, ModelError> {
        let mut words = spec.split(',').map(str::trim);
        let base = words.next().unwrap_or_default();
        let host_vendor = Vendor::of(&host.vendor()).unwrap_or(Vendor::Intel);
        let mut model = CpuModel {
            name: format!("{base}-1"),
            vendor: host_vendor,
            signature: host.get(1, 0)[0],
            features: FeatureSet::default(),
            tsc_hz: offer.tsc_hz,
            physical_bits: physical_bits(host, offer),
            brand: leaves::brand(host),
            copied: leaves::copied(host),
        };

        // Vendor first: it decides which features exist.
        let options: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
        let mut signature = None;
        for option in options.iter().filter(|option| option.contains('=')) {
            let bad = || ModelError::BadOption((*option).to_owned());
            let (key, value) = option.split_once('=').ok_or_else(bad)?;
            let number = |max: u32| value.parse::<u32>().ok().filter(|n| *n <= max).ok_or_else(bad);
            let before = signature.unwrap_or(model.signature);
            match key {
                "vendor" => {
                    model.vendor = VENDORS
                        .iter()
                        .find(|(_, letters)| letters.trim_ascii() == value.as_bytes())
                        .map(|(vendor, _)| *vendor)
                        .ok_or_else(bad)?;
                    if model.vendor != host_vendor && signature.is_none() {
                        signature = Some(model.vendor.usual_signature());
                    }
                }
                "family" => {
                    let family = number(0xf + 0xff)?;
                    let (base, extended) = (family.min(0xf), family.saturating_sub(0xf));
                    signature = Some(before & !0x0ff0_0f00 | base << 8 | extended << 20);
                }
                "model" => {
                    let number = number(0xff)?;
                    signature = Some(before & !0x000f_00f0 | (number & 15) << 4 | (number >> 4) << 16);
                }
                "stepping" => signature = Some(before & !15 | number(15)?),
                _ => return Err(bad()),
            }
        }

        let available = model.available(host, offer);
        if base == "host" {
            model.features = available;
        } else {
            model.features = level(base, &available)?;
            model.signature = model.vendor.usual_signature();
            model.brand = leaves::padded(&format!("Wardian {base}"));
        }
        // The TSC is invariant, but who is told so prefers it to kvm-clock, which alone knows of stolen time
        // and of moves to another host: `+invtsc` says it.
        model.features.set(Feature::InvariantTsc, false);
        if let Some(signature) = signature {
            model.signature = signature;
        }
        model.apply(&options, &available)?;
        Ok(model)
    }

    /// What the host and the engine together have, by the table.
    fn available(&self, host: &HostCpuid, offer: &Offer) -> FeatureSet {
        let mut set = FeatureSet::default();
        for row in TABLE {
            let place = row.place;
            let on_host = host.get(place.leaf, place.subleaf)[place.register] >> place.bit & 1 != 0;
            let present = match row.carry {
                _ if offer.carrier == Carrier::Hardware => features::on_hardware(row, on_host),
                Carry::Host => on_host,
                Carry::Avx512 => on_host && offer.avx512,
                Carry::Engine => true,
                Carry::EngineAmd => self.vendor.is_amd_like(),
                Carry::No => false,
            };
            set.set(row.feature, present);
        }
        set.close();
        set
    }

    fn apply(&mut self, options: &[&str], available: &FeatureSet) -> Result<(), ModelError> {
        let mut wanted = Vec::new();
        let mut missing = Vec::new();
        for option in options.iter().filter(|option| !option.contains('=')) {
            let (present, name) = match (option.strip_prefix('+'), option.strip_prefix('-')) {
                (Some(name), _) => (true, name),
                (_, Some(name)) => (false, name),
                _ => return Err(ModelError::BadOption((*option).to_owned())),
            };
            let feature =
                Feature::by_name(name).ok_or_else(|| ModelError::UnknownFeature(name.to_owned()))?;
            if present && !available.has(feature) {
                missing.push(name);
                continue;
            }
            self.features.set(feature, present);
            wanted.retain(|other| *other != feature);
            if present {
                wanted.push(feature);
            }
        }
        self.features.close();
        missing
            .extend(wanted.iter().filter(|wanted| !self.features.has(**wanted)).map(|wanted| wanted.name()));
        if missing.is_empty() { Ok(()) } else { Err(ModelError::Unavailable(missing.join(", "))) }
    }

    /// Whether the guest has `feature`.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// Everything that the guest has.
    #[must_use]
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// Whose processor it is.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Leaf 1 EAX, also EDX after RESET (Intel SDM vol. 3A, 9.1.2).
    #[must_use]
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// Rate of the TSC in Hz.
    #[must_use]
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// Width of physical addresses in bits (MAXPHYADDR).
    #[must_use]
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// Width of linear addresses in bits.
    #[must_use]
    pub fn linear_bits(&self) -> u32 {
        48
    }

    /// The bits of CR4 that may be set (Intel SDM vol. 3A, 2.5); every other raises #GP(0).
    #[must_use]
    pub fn cr4_mask(&self) -> u64 {
        use Feature as F;
        let by_feature = [
            (F::Vme, cr4::VME | cr4::PVI),
            (F::Tsc, cr4::TSD),
            (F::De, cr4::DE),
            (F::Pse, cr4::PSE),
            (F::Pae, cr4::PAE),
            (F::Mce, cr4::MCE),
            (F::Pge, cr4::PGE),
            (F::Fxsr, cr4::OSFXSR),
            (F::Sse, cr4::OSXMMEXCPT),
            (F::Umip, cr4::UMIP),
            (F::La57, cr4::LA57),
            (F::Fsgsbase, cr4::FSGSBASE),
            (F::Pcid, cr4::PCIDE),
            (F::Xsave, cr4::OSXSAVE),
            (F::Smep, cr4::SMEP),
            (F::Smap, cr4::SMAP),
            (F::Pku, cr4::PKE),
        ];
        by_feature
            .iter()
            .filter(|(feature, _)| self.has(*feature))
            .fold(cr4::PCE, |mask, (_, bits)| mask | bits)
    }

    /// The bits of EFER that may be set; LMA is the processor's own (Intel SDM vol. 3A, 2.2.1).
    #[must_use]
    pub fn efer_mask(&self) -> u64 {
        let mut mask = 0;
        if self.has(Feature::Syscall) {
            mask |= efer::SCE;
        }
        if self.has(Feature::Lm) {
            mask |= efer::LME | efer::LMA;
        }
        if self.has(Feature::Nx) {
            mask |= efer::NXE;
        }
        mask
    }

    /// The bits of XCR0 that may be set (Intel SDM vol. 1, 13.3); zero without XSAVE.
    #[must_use]
    pub fn xcr0_mask(&self) -> u64 {
        if !self.has(Feature::Xsave) {
            return 0;
        }
        let mut mask = 0b11;
        if self.has(Feature::Avx) {
            mask |= 0b100;
        }
        if self.has(Feature::Avx512f) {
            mask |= 0b1110_0000;
        }
        mask
    }

    /// `IA32_ARCH_CAPABILITIES` (Intel SDM vol. 4, table 2-2); zero when it is not offered.
    #[must_use]
    pub fn arch_capabilities(&self) -> u64 {
        if !self.has(Feature::ArchCapabilities) {
            return 0;
        }
        const BITS: [u32; 15] = [
            0,  // RDCL_NO
            1,  // IBRS_ALL
            3,  // SKIP_L1DFL_VMENTRY
            4,  // SSB_NO
            5,  // MDS_NO
            6,  // IF_PSCHANGE_MC_NO
            8,  // TAA_NO
            13, // SBDR_SSDP_NO
            14, // FBSDP_NO
            15, // PSDP_NO
            20, // BHI_NO
            24, // PBRSB_NO
            26, // GDS_NO
            27, // RFDS_NO
            62, // ITS_NO
        ];
        BITS.iter().fold(0, |mask, bit| mask | 1 << bit)
    }

    /// The bits of `IA32_SPEC_CTRL` that a guest may write without effect: IBRS where
    /// [`CpuModel::arch_capabilities`] promises `IBRS_ALL` (Linux writes it once at boot although CPUID does not
    /// announce the register), and `BHI_DIS_S` where it is offered.
    #[must_use]
    pub fn spec_ctrl_mask(&self) -> u64 {
        (self.arch_capabilities() >> 1 & 1) | u64::from(self.has(Feature::BhiCtrl)) << 10
    }
}

fn level(name: &str, available: &FeatureSet) -> Result<FeatureSet, ModelError> {
    let last = LEVELS
        .iter()
        .position(|(known, _)| *known == name)
        .ok_or_else(|| ModelError::UnknownModel(name.to_owned()))?;
    let mut set = FeatureSet::default();
    for row in TABLE.iter().filter(|row| matches!(row.carry, Carry::Engine | Carry::EngineAmd)) {
        set.set(row.feature, available.has(row.feature));
    }
    let mut missing = Vec::new();
    for feature in LEVELS[..=last].iter().flat_map(|(_, names)| names.iter()) {
        match Feature::by_name(feature) {
            Some(known) if available.has(known) => set.set(known, true),
            _ => missing.push(*feature),
        }
    }
    if missing.is_empty() { Ok(set) } else { Err(ModelError::Unavailable(missing.join(", "))) }
}

/// Width of guest physical addresses: what holds all guest RAM and devices; hardware cannot do more than it has.
fn physical_bits(host: &HostCpuid, offer: &Offer) -> u32 {
    let bits = host.get(0x8000_0008, 0)[0] & 0xff;
    match offer.carrier {
        Carrier::Translator => bits.clamp(40, 46),
        Carrier::Hardware => bits.clamp(36, 46),
    }
}
