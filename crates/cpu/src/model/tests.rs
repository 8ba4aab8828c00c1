use super::*;

const INTEL: &[((u32, u32), [u32; 4])] = &[
    ((0, 0), [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
    ((1, 0), [0x000a_0671, 0x0002_0800, 0xfffa_3203, 0x1f8b_fbff]),
    ((2, 0), [0x00fe_ff01, 0xf0, 0, 0]),
    ((4, 0), [0x0400_4121, 0x02c0_003f, 0x3f, 0]),
    ((4, 1), [0x0400_4122, 0x03c0_003f, 0x3f, 0]),
    ((4, 2), [0x0400_4143, 0x03c0_003f, 0x7ff, 0]),
    ((4, 3), [0x0400_4163, 0x03c0_003f, 0x7_7fff, 0]),
    ((6, 0), [0x77, 9, 9, 0]),
    ((7, 0), [2, 0xf1bf_2ffb, 0x1a41_5f4e, 0x23c1_4010]),
    ((7, 1), [0x0000_1c30, 0, 0, 0x0008_4000]),
    ((0xa, 0), [0x0730_0404, 0, 0, 0x603]),
    ((0xd, 0), [0x0006_02e7, 0x2b00, 0x2b00, 0]),
    ((0xd, 1), [0x1f, 0x29c0, 0, 0]),
    ((0xd, 2), [0x100, 0x240, 0, 0]),
    ((0xd, 5), [0x40, 0x440, 0, 0]),
    ((0xd, 6), [0x200, 0x480, 0, 0]),
    ((0xd, 7), [0x400, 0x680, 0, 0]),
    ((0xd, 9), [8, 0xa80, 0, 0]),
    ((0xd, 17), [0x40, 0xac0, 2, 0]),
    ((0xd, 18), [0x2000, 0xb00, 6, 0]),
    ((0x8000_0000, 0), [0x8000_0008, 0, 0, 0]),
    ((0x8000_0001, 0), [0, 0, 0x121, 0x2c10_0800]),
    ((0x8000_0002, 0), [0x6574_6e49, 0x2952_286c, 0x6f65_5820, 0x2952_286e]),
    ((0x8000_0006, 0), [0, 0, 0x0800_7040, 0]),
    ((0x8000_0007, 0), [0, 0, 0, 0x100]),
    ((0x8000_0008, 0), [0x0030_3930, 0x200, 0, 0]),
];

const AMD: &[((u32, u32), [u32; 4])] = &[
    ((0, 0), [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    ((1, 0), [0x00a6_0f12, 0x0c10_0800, 0x7ef8_320b, 0x178b_fbff]),
    ((7, 0), [1, 0xf1bf_97a9, 0x0040_5fce, 0x1000_0010]),
    ((7, 1), [0x20, 0, 0, 0]),
    ((0xd, 0), [0x0000_02e7, 0x340, 0x988, 0]),
    ((0xd, 1), [0xf, 0x358, 0x1800, 0]),
    ((0xd, 2), [0x100, 0x240, 0, 0]),
    ((0xd, 5), [0x40, 0x340, 0, 0]),
    ((0xd, 6), [0x200, 0x380, 0, 0]),
    ((0xd, 7), [0x400, 0x580, 0, 0]),
    ((0x8000_0000, 0), [0x8000_0028, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
    ((0x8000_0001, 0), [0x00a6_0f12, 0x4000_0000, 0x75c2_37ff, 0x2fd3_fbff]),
    ((0x8000_0005, 0), [0xff48_ff40, 0xff48_ff40, 0x2008_0140, 0x2008_0140]),
    ((0x8000_0006, 0), [0x5c00_2200, 0x6c00_4200, 0x0400_8140, 0x0080_9140]),
    ((0x8000_0008, 0), [0x0003_3930, 0x791e_f257, 0xb, 0x1_0000]),
    ((0x8000_001d, 0), [0x0000_4121, 0x01c0_003f, 0x3f, 0]),
    ((0x8000_001d, 3), [0x0002_c163, 0x03c0_003f, 0x7fff, 1]),
    ((0x8000_0021, 0), [0x6245, 0, 0, 0]),
];

fn host(answers: &[((u32, u32), [u32; 4])]) -> HostCpuid {
    HostCpuid::from_answers(answers.iter().copied())
}

fn make(spec: &str, answers: &[((u32, u32), [u32; 4])], avx512: bool) -> Result<CpuModel, ModelError> {
    CpuModel::from_host(spec, &Offer { avx512, tsc_hz: 2_600_000_000, ..Offer::default() }, &host(answers))
}

const FOUR: CpuidContext = CpuidContext { apic_id: 2, cpus: 4, xcr0: 7, osxsave: true, apic_enabled: true };

#[test]
fn table_has_each_place_and_name_once() {
    let mut places: Vec<_> = TABLE.iter().map(|row| format!("{:?}", row.place)).collect();
    let mut names: Vec<_> = TABLE.iter().map(|row| row.name).collect();
    places.sort();
    places.dedup();
    names.sort_unstable();
    names.dedup();
    assert_eq!((places.len(), names.len()), (TABLE.len(), TABLE.len()));
    for row in TABLE {
        assert_eq!(row.feature.row().name, row.name);
        assert_eq!(Feature::by_name(row.name), Some(row.feature));
    }
}

#[test]
fn intel_host_loses_what_is_not_carried() {
    let model = make("host", INTEL, false).unwrap();
    for name in
        ["hle", "rtm", "mpx", "avx512f", "amx_tile", "xsaves", "xsaveopt", "pku", "monitor", "vmx", "waitpkg"]
    {
        assert!(!model.has(Feature::by_name(name).unwrap()), "{name}");
    }
    for name in
        ["avx2", "fma", "vaes", "gfni", "sha_ni", "pcid", "smap", "pdpe1gb", "rdpid", "xsavec", "avx_vnni"]
    {
        assert!(model.has(Feature::by_name(name).unwrap()), "{name}");
    }
    // Leaf 7 EBX: HLE, RTM and AVX-512 gone. Monitoring counters absent.
    assert_eq!(model.cpuid(7, 0, &FOUR)[1] & (1 << 4 | 1 << 11 | 1 << 16 | 1 << 30 | 1 << 31), 0);
    assert_eq!(model.cpuid(0xa, 0, &FOUR), [0; 4]);
    assert_eq!(model.cpuid(6, 0, &FOUR), [4, 0, 0, 0]);
    assert_eq!(model.cpuid(0x8000_0008, 0, &FOUR)[0], 0x302e); // 46 physical, 48 linear
    assert_eq!(model.vendor(), Vendor::Intel);
    assert_eq!(model.cpuid(1, 0, &FOUR)[0], 0x000a_0671);
}

#[test]
fn xsave_sizes_follow_the_carried_state() {
    let narrow = make("host", INTEL, false).unwrap();
    assert_eq!(narrow.xcr0_mask(), 7);
    assert_eq!(narrow.cpuid(0xd, 0, &FOUR), [7, 832, 832, 0]);
    assert_eq!(narrow.cpuid(0xd, 1, &FOUR), [2, 832, 0, 0]);
    assert_eq!(narrow.cpuid(0xd, 0, &CpuidContext { xcr0: 3, ..FOUR })[1], 576);
    for component in [5, 6, 7, 9, 17, 18, 63, 64] {
        assert_eq!(narrow.cpuid(0xd, component, &FOUR), [0; 4], "{component}");
    }
    let wide = make("host", INTEL, true).unwrap();
    assert_eq!(wide.xcr0_mask(), 0xe7);
    assert_eq!(wide.cpuid(0xd, 0, &CpuidContext { xcr0: 0xe7, ..FOUR }), [0xe7, 0xa80, 0xa80, 0]);
    assert_eq!(wide.cpuid(0xd, 1, &CpuidContext { xcr0: 0xe7, ..FOUR })[1], 576 + 256 + 64 + 512 + 1024);
    assert_eq!(wide.cpuid(0xd, 7, &FOUR), [0x400, 0x680, 0, 0]);
    let amd = make("host", AMD, true).unwrap();
    assert_eq!(amd.cpuid(0xd, 0, &CpuidContext { xcr0: 0xe7, ..FOUR })[2], 0x980);
}

#[test]
fn bits_that_depend_on_the_vcpu() {
    let model = make("host", INTEL, false).unwrap();
    let off = CpuidContext { osxsave: false, apic_enabled: false, cpus: 1, ..FOUR };
    assert_eq!(model.cpuid(1, 0, &FOUR)[2] >> 27 & 1, 1);
    assert_eq!(model.cpuid(1, 0, &off)[2] >> 27 & 1, 0);
    assert_eq!(model.cpuid(1, 0, &FOUR)[3] & (1 << 9 | 1 << 28), 1 << 9 | 1 << 28);
    assert_eq!(model.cpuid(1, 0, &off)[3] & (1 << 9 | 1 << 28), 0);
    assert_eq!(model.cpuid(1, 0, &FOUR)[1], 0x0204_0800);
}

#[test]
fn topology_is_one_socket_of_cores() {
    for (cpus, shift) in [(1, 0), (2, 1), (3, 2), (4, 2), (255, 8), (1000, 10)] {
        let context = CpuidContext { cpus, apic_id: cpus - 1, ..FOUR };
        let intel = make("host", INTEL, false).unwrap();
        assert_eq!(intel.cpuid(0xb, 0, &context), [0, 1, 0x100, cpus - 1]);
        assert_eq!(intel.cpuid(0xb, 1, &context), [shift, cpus, 0x201, cpus - 1]);
        assert_eq!(intel.cpuid(0xb, 2, &context), [0, 0, 2, cpus - 1]);
        let amd = make("host", AMD, false).unwrap();
        assert_eq!(amd.cpuid(0x8000_001e, 0, &context)[0], cpus - 1);
        assert_eq!(amd.cpuid(0x8000_0008, 0, &context)[2], (cpus - 1).min(255) | shift << 12);
    }
    let intel = make("host", INTEL, false).unwrap();
    assert_eq!(intel.cpuid(4, 0, &FOUR)[0], 0x0c00_0121); // private
    assert_eq!(intel.cpuid(4, 3, &FOUR)[0], 0x0c00_c163); // shared by 4
    assert_eq!(intel.cpuid(4, 4, &FOUR), [0; 4]);
    let amd = make("host", AMD, false).unwrap();
    assert_eq!(amd.cpuid(0x8000_001d, 3, &FOUR)[0], 0x0000_c163);
    assert_eq!(amd.cpuid(4, 0, &FOUR), [0; 4]);
}

#[test]
fn hypervisor_and_timing_leaves() {
    let model = make("host", INTEL, false).unwrap();
    let [max, b, c, d] = model.cpuid(0x4000_0000, 0, &FOUR);
    let letters: Vec<u8> = [b, c, d].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!((max, letters.as_slice()), (0x4000_0010, &b"KVMKVMKVM\0\0\0"[..]));
    assert_eq!(model.cpuid(0x4000_0001, 0, &FOUR)[0], wardian_time::paravirt::CPUID_FEATURES);
    assert_eq!(model.cpuid(0x4000_0010, 0, &FOUR), [2_600_000, 1_000_000, 0, 0]);
    assert_eq!(model.cpuid(0x4000_0100, 0, &FOUR), [0; 4]);
    let [denominator, numerator, crystal, _] = model.cpuid(0x15, 0, &FOUR);
    assert_eq!(u64::from(crystal) * u64::from(numerator) / u64::from(denominator), 2_600_000_000);
    assert!(crystal / 1000 * numerator > 0 && (crystal / 1000).checked_mul(numerator).is_some());
    // A rate that cannot be stated exactly is not stated.
    let odd = CpuModel::from_host(
        "host",
        &Offer { avx512: false, tsc_hz: 2_599_998_123, ..Offer::default() },
        &host(INTEL),
    )
    .unwrap();
    assert_eq!((odd.cpuid(0, 0, &FOUR)[0], odd.cpuid(0x4000_0010, 0, &FOUR)[0]), (0xd, 2_599_998));
    let hidden = make("host,-hypervisor", INTEL, false).unwrap();
    assert_eq!(hidden.cpuid(0x4000_0000, 0, &FOUR), [0; 4]);
}

#[test]
fn leaves_out_of_range() {
    let intel = make("host", INTEL, false).unwrap();
    let last = intel.cpuid(0, 0, &FOUR)[0];
    assert_eq!(intel.cpuid(last + 1, 0, &FOUR), intel.cpuid(last, 0, &FOUR));
    assert_eq!(intel.cpuid(0xffff_ffff, 9, &FOUR), intel.cpuid(last, 9, &FOUR));
    let amd = make("host", AMD, false).unwrap();
    assert_eq!(amd.cpuid(0x11, 0, &FOUR), [0; 4]);
    assert_eq!(amd.cpuid(0x8000_0000, 0, &FOUR)[0], 0x8000_0021);
}

#[test]
fn control_register_bits() {
    let model = make("host", INTEL, false).unwrap();
    for bit in [cr4::PCIDE, cr4::SMEP, cr4::SMAP, cr4::UMIP, cr4::FSGSBASE, cr4::OSXSAVE, cr4::PGE, cr4::TSD]
    {
        assert_ne!(model.cr4_mask() & bit, 0, "{bit:#x}");
    }
    assert_eq!(model.cr4_mask() & (cr4::LA57 | cr4::PKE | cr4::VME | 1 << 13 | 1 << 23), 0);
    assert_eq!(model.efer_mask(), 0xd01);
    let less = make("host,-pcid,-xsave,-nx", INTEL, false).unwrap();
    assert_eq!(less.cr4_mask() & (cr4::PCIDE | cr4::OSXSAVE), 0);
    assert_eq!((less.efer_mask(), less.xcr0_mask()), (0x501, 0));
    assert_eq!(less.cpuid(0xd, 0, &FOUR), [0; 4]);
    assert!(!less.has(Feature::Avx2) && !less.has(Feature::Fma));
}

#[test]
fn speculation_is_answered_without_costly_controls() {
    for answers in [INTEL, AMD] {
        let model = make("host", answers, false).unwrap();
        let capabilities = model.arch_capabilities();
        for bit in [0, 1, 4, 5, 8, 13, 14, 15, 20, 24, 26, 27, 62] {
            assert_eq!(capabilities >> bit & 1, 1, "bit {bit}");
        }
        assert_eq!(capabilities & (1 << 2 | 1 << 7 | 1 << 17), 0); // RSBA, TSX_CTRL, FB_CLEAR
        assert_eq!(model.cpuid(7, 0, &FOUR)[3] >> 26 & 0b11_1011, 0b00_1000); // only ARCH_CAPABILITIES
        assert_eq!(model.cpuid(0x8000_0008, 0, &FOUR)[1] & 0x0300_d000, 0); // no IBPB, IBRS, STIBP, SSBD
        assert_ne!(model.cpuid(0x8000_0008, 0, &FOUR)[1] & (1 << 29), 0); // not a victim of Retbleed
        assert_eq!(model.spec_ctrl_mask(), 1 | 1 << 10);
        assert_eq!(model.cpuid(7, 0, &FOUR)[0], 2);
        assert_eq!(model.cpuid(7, 2, &FOUR), [0, 0, 0, 1 << 4]); // BHI_CTRL
    }
    let none = make("host,-arch_capabilities,-bhi_ctrl", INTEL, false).unwrap();
    assert_eq!((none.arch_capabilities(), none.spec_ctrl_mask()), (0, 0));
}

#[test]
fn vendor_can_be_changed() {
    let model = make("host,vendor=AuthenticAMD", INTEL, false).unwrap();
    assert_eq!(model.vendor(), Vendor::Amd);
    assert_eq!(model.cpuid(0, 0, &FOUR)[1..], [0x6874_7541, 0x444d_4163, 0x6974_6e65]);
    assert_eq!(model.cpuid(1, 0, &FOUR)[0], 0x00a1_0f11);
    let [eax, _, ecx, edx] = model.cpuid(0x8000_0001, 0, &FOUR);
    assert_eq!((eax, edx & 1, ecx >> 22 & 1), (0x00a1_0f11, 1, 1));
    let exact = make("host,family=25,model=97,stepping=2", AMD, false).unwrap();
    assert_eq!(exact.signature() & 0x0fff_0fff, 0x00a6_0f12);
    let intel = make("host,vendor=GenuineIntel", AMD, false).unwrap();
    assert_eq!(intel.cpuid(0x8000_0000, 0, &FOUR)[0], 0x8000_0008);
    assert!(!intel.has(Feature::Topoext));
}

#[test]
fn invariant_tsc_is_announced_on_demand() {
    for spec in ["host", "x86-64-v2"] {
        for (more, bit) in [("", 0), (",+invtsc", 1), (",+nonstop_tsc", 1), (",+invtsc,-invtsc", 0)] {
            let model = make(&format!("{spec}{more}"), INTEL, false).unwrap();
            assert_eq!(model.cpuid(0x8000_0007, 0, &FOUR)[3] >> 8 & 1, bit, "{spec}{more}");
        }
    }
}

#[test]
fn named_levels_and_bad_specs() {
    let v2 = make("x86-64-v2", INTEL, false).unwrap();
    assert!(
        v2.has(Feature::Sse42) && !v2.has(Feature::Avx) && v2.has(Feature::Smap) && !v2.has(Feature::Aes)
    );
    assert_eq!((v2.name.as_str(), v2.xcr0_mask()), ("x86-64-v2-1", 0));
    assert!(make("x86-64-v2,+aes", INTEL, false).unwrap().has(Feature::Aes));
    assert!(make("x86-64-v4", INTEL, true).unwrap().has(Feature::Avx512vl));
    let unavailable = |name: &str| Err(ModelError::Unavailable(name.to_owned()));
    let all = "avx512f, avx512bw, avx512cd, avx512dq, avx512vl";
    assert_eq!(make("x86-64-v4", INTEL, false), unavailable(all));
    assert_eq!(make("host,+rtm,+sse4a", INTEL, true), unavailable("rtm, sse4a"));
    assert_eq!(make("host,-avx,+avx2", INTEL, true), unavailable("avx2"));
    assert_eq!(make("host,+sse4a", INTEL, true), unavailable("sse4a"));
    assert_eq!(make("host,+flux", INTEL, true), Err(ModelError::UnknownFeature("flux".into())));
    assert_eq!(make("pentium", INTEL, true), Err(ModelError::UnknownModel("pentium".into())));
    for bad in ["vendor=Nobody", "family=999", "model=x", "avx", "tsc=1"] {
        assert_eq!(make(&format!("host,{bad}"), INTEL, true), Err(ModelError::BadOption(bad.into())));
    }
    assert!(make("host, -avx , ", INTEL, true).is_ok());
}

#[test]
fn the_real_host_makes_a_64_bit_model() {
    let model =
        CpuModel::host("host", &Offer { avx512: false, tsc_hz: 1_000_000_000, ..Offer::default() }).unwrap();
    for feature in [Feature::Lm, Feature::Sse2, Feature::Cx8, Feature::Nx, Feature::Fpu] {
        assert!(model.has(feature), "{}", feature.name());
    }
}

/// On hardware the hypervisor's word counts, whatever the software engine makes of a feature.
#[test]
fn on_hardware_the_host_decides() {
    let offer = |carrier| Offer { carrier, avx512: true, tsc_hz: 2_000_000_000 };
    let answers = HostCpuid::read();
    let hardware = CpuModel::from_host("host", &offer(Carrier::Hardware), &answers).unwrap();
    for row in FEATURES {
        let place = row.place;
        let on_host = answers.get(place.leaf, place.subleaf)[place.register] >> place.bit & 1 != 0;
        let ours =
            [Feature::Arat, Feature::Hypervisor, Feature::TscAdjust, Feature::TscDeadline, Feature::X2apic];
        if hardware.has(row.feature) && !ours.contains(&row.feature) {
            assert!(on_host, "{} is not the host's", row.name);
        }
    }
    for feature in
        [Feature::Svm, Feature::Vmx, Feature::La57, Feature::Pku, Feature::AmxTile, Feature::InvariantTsc]
    {
        assert!(!hardware.has(feature), "{}", feature.name());
    }
    let nothing = HostCpuid::from_answers([]);
    let bare = CpuModel::from_host("host", &offer(Carrier::Hardware), &nothing).unwrap();
    assert!(!bare.has(Feature::Nx) && bare.has(Feature::X2apic));
    assert!(bare.physical_bits() >= 36);
}
