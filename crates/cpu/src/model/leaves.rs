//! Composing the answers of CPUID, leaf by leaf (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`).

use super::features::{Feature, TABLE};
use super::{CpuModel, CpuidContext, HostCpuid};

/// Rate of the local APIC timer's clock in kHz that the timing leaf states.
const APIC_BUS_KHZ: u32 = 1_000_000;
const LAST_HYPERVISOR: u32 = 0x4000_0010;
const EMPTY: [u32; 4] = [0; 4];

/// The brand string of the host (leaves 8000_0002h to 8000_0004h).
pub(super) fn brand(host: &HostCpuid) -> [u8; 48] {
    let mut out = [0; 48];
    let words = (0x8000_0002..=0x8000_0004).flat_map(|leaf| host.get(leaf, 0));
    for (chunk, word) in out.chunks_exact_mut(4).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// `text` as a brand string: cut or filled with zeros.
pub(super) fn padded(text: &str) -> [u8; 48] {
    let mut out = [0; 48];
    for (to, from) in out.iter_mut().take(47).zip(text.bytes()) {
        *to = from;
    }
    out
}

/// The host's answers that a model hands on, some of them edited when asked for.
pub(super) fn copied(host: &HostCpuid) -> HostCpuid {
    let mut wanted =
        vec![(1, 0), (2, 0), (0x8000_0005, 0), (0x8000_0006, 0), (0x8000_0019, 0), (0x8000_001a, 0)];
    wanted.extend((0..8).map(|sub| (4, sub)));
    wanted.extend((0..8).map(|sub| (0x8000_001d, sub)));
    wanted.extend([2, 5, 6, 7].map(|component| (0xd, component)));
    HostCpuid::from_answers(
        wanted
            .into_iter()
            .map(|(leaf, sub)| ((leaf, sub), host.get(leaf, sub)))
            .filter(|(_, answer)| *answer != EMPTY),
    )
}

fn rounded(cpus: u32) -> u32 {
    cpus.clamp(1, 1 << 16).next_power_of_two()
}

impl CpuModel {
    /// CPUID: EAX, EBX, ECX, EDX for `leaf` (EAX) and `subleaf` (ECX) on the vCPU that `context` describes.
    #[must_use]
    pub fn cpuid(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        let amd = self.vendor().is_amd_like();
        match leaf {
            0..0x4000_0000 if leaf <= self.last_basic() => self.basic(leaf, subleaf, context),
            0x4000_0000..0x5000_0000 => self.hypervisor(leaf),
            0x8000_0000.. if leaf <= self.last_extended() => self.extended(leaf, subleaf, context),
            // Out of range: zeros by AMD's manual, the highest basic leaf by Intel's.
            _ if amd => EMPTY,
            _ => self.basic(self.last_basic(), subleaf, context),
        }
    }

    fn last_basic(&self) -> u32 {
        match self.tsc_leaf() {
            Some(_) => 0x16,
            None => 0xd,
        }
    }

    fn last_extended(&self) -> u32 {
        if self.vendor().is_amd_like() { 0x8000_0021 } else { 0x8000_0008 }
    }

    /// The feature bits of one answer.
    fn words(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut out = EMPTY;
        for row in TABLE.iter().filter(|row| (row.place.leaf, row.place.subleaf) == (leaf, subleaf)) {
            if self.has(row.feature) {
                out[row.place.register] |= 1 << row.place.bit;
            }
        }
        out
    }

    fn vendor_words(&self) -> [u32; 3] {
        let letters = self.vendor().letters();
        let word =
            |at: usize| u32::from_le_bytes([letters[at], letters[at + 1], letters[at + 2], letters[at + 3]]);
        [word(0), word(8), word(4)] // EBX, ECX, EDX
    }

    /// Leaf 15h, where it can state the rate exactly with the timing leaf's clock as the crystal and without
    /// overflowing the 32-bit product that guests compute.
    fn tsc_leaf(&self) -> Option<[u32; 4]> {
        let mhz = self.tsc_hz / 1_000_000;
        let exact = self.tsc_hz.is_multiple_of(1_000_000) && (1..=4000).contains(&mhz);
        (exact && !self.vendor().is_amd_like()).then_some([1000, mhz as u32, APIC_BUS_KHZ * 1000, 0])
    }

    fn basic(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        match leaf {
            0 => {
                let [ebx, ecx, edx] = self.vendor_words();
                [self.last_basic(), ebx, ecx, edx]
            }
            1 => self.leaf_1(context),
            2 if !self.vendor().is_amd_like() => self.copied.get(2, 0),
            4 if !self.vendor().is_amd_like() => {
                let mut out = self.cache(4, subleaf, context);
                if out != EMPTY {
                    out[0] |= (rounded(context.cpus) - 1).min(63) << 26;
                }
                out
            }
            6 => self.words(6, 0),
            7 => match subleaf {
                0 => {
                    let mut out = self.words(7, 0);
                    out[0] = 2;
                    out
                }
                1 | 2 => self.words(7, subleaf),
                _ => EMPTY,
            },
            0xb => topology(subleaf, context),
            0xd => self.xsave_leaf(subleaf, context),
            0x15 => self.tsc_leaf().unwrap_or(EMPTY),
            0x16 => {
                let mhz = (self.tsc_hz / 1_000_000) as u32;
                [mhz, mhz, 100, 0]
            }
            _ => EMPTY,
        }
    }

    fn leaf_1(&self, context: &CpuidContext) -> [u32; 4] {
        let mut out = self.words(1, 0);
        out[0] = self.signature();
        let line = if self.has(Feature::Clflush) { self.copied.get(1, 0)[1] & 0xff00 } else { 0 };
        out[1] = (context.apic_id & 0xff) << 24 | rounded(context.cpus).min(255) << 16 | line;
        if context.osxsave && self.has(Feature::Xsave) {
            out[2] |= 1 << 27;
        }
        if context.cpus > 1 {
            out[3] |= 1 << 28;
        }
        if !context.apic_enabled {
            out[3] &= !(1 << 9);
        }
        out
    }

    /// A cache of the host, shared by one vCPU (levels 1 and 2) or by all.
    fn cache(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        let mut out = self.copied.get(leaf, subleaf);
        if out[0] & 0x1f == 0 {
            return EMPTY;
        }
        let level = out[0] >> 5 & 7;
        let sharing = if level >= 3 { rounded(context.cpus) - 1 } else { 0 };
        out[0] = out[0] & 0x3fff | sharing.min(0xfff) << 14;
        out
    }

    fn xsave_leaf(&self, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        let mask = self.xcr0_mask();
        if mask == 0 {
            return EMPTY;
        }
        let component = |number: u32| self.copied.get(0xd, number);
        let components = |set: u64| [2, 5, 6, 7].into_iter().filter(move |number| set >> number & 1 != 0);
        let standard = |set: u64| {
            components(set).map(component).map(|[size, offset, ..]| offset + size).fold(576, u32::max)
        };
        match subleaf {
            0 => [mask as u32, standard(context.xcr0), standard(mask), (mask >> 32) as u32],
            1 => {
                let mut out = self.words(0xd, 1);
                if self.has(Feature::Xsavec) {
                    out[1] = components(context.xcr0 & mask).map(component).fold(
                        576,
                        |end, [size, _, flags, _]| {
                            let start = if flags & 2 != 0 { end.next_multiple_of(64) } else { end };
                            start + size
                        },
                    );
                }
                out
            }
            2..63 if mask >> subleaf & 1 != 0 => component(subleaf),
            _ => EMPTY,
        }
    }

    fn hypervisor(&self, leaf: u32) -> [u32; 4] {
        if !self.has(Feature::Hypervisor) {
            return EMPTY;
        }
        match leaf {
            0x4000_0000 => [LAST_HYPERVISOR, 0x4b4d_564b, 0x564b_4d56, 0x4d],
            0x4000_0001 => [wardian_time::paravirt::CPUID_FEATURES, 0, 0, 0],
            LAST_HYPERVISOR => [(self.tsc_hz / 1000) as u32, APIC_BUS_KHZ, 0, 0],
            _ => EMPTY,
        }
    }

    fn extended(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        let amd = self.vendor().is_amd_like();
        match leaf {
            0x8000_0000 => {
                let [ebx, ecx, edx] = if amd { self.vendor_words() } else { [0; 3] };
                [self.last_extended(), ebx, ecx, edx]
            }
            0x8000_0001 => {
                let mut out = self.words(leaf, 0);
                if amd {
                    out[0] = self.signature();
                    out[3] |= self.leaf_1(context)[3] & 0x0183_f3ff;
                    if context.cpus > 1 {
                        out[2] |= 1 << 1; // CmpLegacy: cores, not threads
                    }
                }
                out
            }
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 16;
                let word = |n: usize| u32::from_le_bytes(std::array::from_fn(|i| self.brand[at + n * 4 + i]));
                [word(0), word(1), word(2), word(3)]
            }
            0x8000_0005 | 0x8000_0019 | 0x8000_001a if amd => self.copied.get(leaf, 0),
            0x8000_0006 => self.copied.get(leaf, 0),
            0x8000_0007 => self.words(leaf, 0),
            0x8000_0008 => {
                let mut out = self.words(leaf, 0);
                out[0] = self.physical_bits() | self.linear_bits() << 8;
                if amd {
                    let cpus = context.cpus.max(1);
                    out[2] = (cpus - 1).min(0xff) | rounded(cpus).trailing_zeros() << 12;
                }
                out
            }
            0x8000_001d if self.has(Feature::Topoext) => self.cache(leaf, subleaf, context),
            0x8000_001e if self.has(Feature::Topoext) => [context.apic_id, context.apic_id & 0xff, 0, 0],
            0x8000_0021 => self.words(leaf, 0),
            _ => EMPTY,
        }
    }
}

/// Leaf 0Bh: one thread a core, all cores in one package, APIC IDs in the order of the vCPUs.
fn topology(subleaf: u32, context: &CpuidContext) -> [u32; 4] {
    let [eax, ebx, kind] = match subleaf {
        0 => [0, 1, 1],
        1 => [rounded(context.cpus).trailing_zeros(), context.cpus.clamp(1, 0xffff), 2],
        _ => [0, 0, 0],
    };
    [eax, ebx, kind << 8 | subleaf & 0xff, context.apic_id]
}
