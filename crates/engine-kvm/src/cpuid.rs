//! A [`CpuModel`] as the table that KVM answers CPUID from.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use wardian_cpu::{CpuModel, CpuidContext};

/// The leaves with subleaves, and how many are asked.
const SUBLEAVES: [(u32, u32); 5] = [(0x4, 8), (0x7, 2), (0xb, 3), (0xd, 63), (0x8000_001d, 8)];

/// The table for vCPU `index` of `cpus`. What depends on the vCPU's state (OSXSAVE, the APIC bit, the sizes of state
/// components in use) the kernel keeps up by itself.
pub(crate) fn table(model: &CpuModel, index: usize, cpus: usize) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let context = CpuidContext {
        apic_id: index as u32,
        cpus: cpus as u32,
        xcr0: 1,
        osxsave: false,
        apic_enabled: true,
    };
    let mut entries = Vec::new();
    for base in [0, 0x4000_0000, 0x8000_0000u32] {
        let last = model.cpuid(base, 0, &context)[0];
        for leaf in base..=last.clamp(base, base + 0x40) {
            let subleaves = SUBLEAVES.iter().find(|(of, _)| *of == leaf).map(|(_, count)| *count);
            for subleaf in 0..subleaves.unwrap_or(1) {
                let [eax, ebx, ecx, edx] = model.cpuid(leaf, subleaf, &context);
                if [eax, ebx, ecx, edx] == [0; 4] && (subleaf > 0 || subleaves.is_none()) {
                    continue;
                }
                let flags = if subleaves.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
                entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index: subleaf,
                    flags,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                });
            }
        }
    }
    CpuId::from_entries(&entries)
}

#[cfg(test)]
mod tests {
    use super::table;
    use wardian_cpu::{Carrier, CpuModel, HostCpuid, Offer};

    #[test]
    fn the_table_says_what_the_model_says() {
        let offer = Offer { carrier: Carrier::Hardware, avx512: true, tsc_hz: 2_000_000_000 };
        let model = CpuModel::from_host("host", &offer, &HostCpuid::read()).unwrap();
        let table = table(&model, 1, 2).unwrap();
        let entry = |leaf: u32, subleaf: u32| {
            table.as_slice().iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf)).copied()
        };
        assert_eq!(entry(1, 0).unwrap().ebx >> 24, 1, "the APIC ID");
        assert_eq!(entry(0x4000_0000, 0).unwrap().ebx, 0x4b4d_564b);
        assert_eq!(entry(0x4000_0010, 0).unwrap().eax, 2_000_000);
        assert_eq!(entry(0xb, 1).unwrap().ecx >> 8 & 0xff, 2);
        assert!(entry(7, 0).is_some() && entry(0x8000_0008, 0).is_some());
        assert!(table.as_slice().len() < 100);
    }
}
