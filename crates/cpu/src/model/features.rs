//! The table of CPUID features: where each is, what Linux calls it, who carries it.
//!
//! Source: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; names as in Linux `/proc/cpuinfo`.

/// Who makes a feature work in a guest of the software engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carry {
    /// Instructions copied to the host processor: offered if the host has it.
    Host,
    /// The same, and the host's AVX-512 state must be carried ([`super::Offer::avx512`]).
    Avx512,
    /// The engine makes it, whatever the host has.
    Engine,
    /// The engine makes it, and only processors of AMD's design know it.
    EngineAmd,
    /// Not carried.
    No,
}

/// Where a feature bit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf.
    pub subleaf: u32,
    /// Register: 0 EAX, 1 EBX, 2 ECX, 3 EDX.
    pub register: usize,
    /// Bit number.
    pub bit: u32,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The feature.
    pub feature: Feature,
    /// Its name in `/proc/cpuinfo`.
    pub name: &'static str,
    /// Where CPUID says it.
    pub place: Place,
    /// Who carries it.
    pub carry: Carry,
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

macro_rules! features {
    ($(($leaf:literal, $sub:literal, $register:ident): $($bit:literal $variant:ident $name:literal $carry:ident),+ ;)+) => {
        /// A processor feature that CPUID announces.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)] // Each is documented by its row in TABLE.
        pub enum Feature { $($($variant),+),+ }

        /// Every feature known by name, in the order of [`Feature`].
        pub static TABLE: &[Row] = &[$($(Row {
            feature: Feature::$variant,
            name: $name,
            place: Place { leaf: $leaf, subleaf: $sub, register: $register, bit: $bit },
            carry: Carry::$carry,
        }),+),+];
    };
}

features! {
    (0x1, 0, EDX):
        0 Fpu "fpu" Host, 1 Vme "vme" No, 2 De "de" Engine, 3 Pse "pse" Engine, 4 Tsc "tsc" Engine,
        5 Msr "msr" Engine, 6 Pae "pae" Engine, 7 Mce "mce" Engine, 8 Cx8 "cx8" Host, 9 Apic "apic" Engine,
        11 Sep "sep" Engine, 12 Mtrr "mtrr" Engine, 13 Pge "pge" Engine, 14 Mca "mca" Engine,
        15 Cmov "cmov" Host, 16 Pat "pat" Engine, 17 Pse36 "pse36" Engine, 18 Pn "pn" No,
        19 Clflush "clflush" Host, 21 Ds "dts" No, 22 Acpi "acpi" No, 23 Mmx "mmx" Host, 24 Fxsr "fxsr" Host,
        25 Sse "sse" Host, 26 Sse2 "sse2" Host, 27 Ss "ss" Engine, 29 Tm "tm" No, 31 Pbe "pbe" No;
    (0x1, 0, ECX):
        0 Sse3 "pni" Host, 1 Pclmulqdq "pclmulqdq" Host, 2 Dtes64 "dtes64" No, 3 Monitor "monitor" No,
        4 DsCpl "ds_cpl" No, 5 Vmx "vmx" No, 6 Smx "smx" No, 7 Est "est" No, 8 Tm2 "tm2" No,
        9 Ssse3 "ssse3" Host, 11 Sdbg "sdbg" No, 12 Fma "fma" Host, 13 Cx16 "cx16" Host, 14 Xtpr "xtpr" No,
        15 Pdcm "pdcm" No, 17 Pcid "pcid" Engine, 18 Dca "dca" No, 19 Sse41 "sse4_1" Host,
        20 Sse42 "sse4_2" Host, 21 X2apic "x2apic" Engine, 22 Movbe "movbe" Host, 23 Popcnt "popcnt" Host,
        24 TscDeadline "tsc_deadline_timer" Engine, 25 Aes "aes" Host, 26 Xsave "xsave" Host,
        28 Avx "avx" Host, 29 F16c "f16c" Host, 30 Rdrand "rdrand" Host, 31 Hypervisor "hypervisor" Engine;
    (0x6, 0, EAX):
        0 Dtherm "dtherm" No, 1 Ida "ida" No, 2 Arat "arat" Engine, 4 Pln "pln" No, 6 Pts "pts" No, 7 Hwp "hwp" No;
    (0x7, 0, EBX):
        0 Fsgsbase "fsgsbase" Engine, 1 TscAdjust "tsc_adjust" Engine, 2 Sgx "sgx" No, 3 Bmi1 "bmi1" Host,
        4 Hle "hle" No, 5 Avx2 "avx2" Host, 6 FdpExcptnOnly "fdp_excptn_only" Host, 7 Smep "smep" Engine,
        8 Bmi2 "bmi2" Host, 9 Erms "erms" Host, 10 Invpcid "invpcid" Engine, 11 Rtm "rtm" No, 12 Cqm "cqm" No,
        13 ZeroFcsFds "zero_fcs_fds" Host, 14 Mpx "mpx" No, 15 RdtA "rdt_a" No, 16 Avx512f "avx512f" Avx512,
        17 Avx512dq "avx512dq" Avx512, 18 Rdseed "rdseed" Host, 19 Adx "adx" Host, 20 Smap "smap" Engine,
        21 Avx512ifma "avx512ifma" Avx512, 23 Clflushopt "clflushopt" Host, 24 Clwb "clwb" Host,
        25 IntelPt "intel_pt" No, 26 Avx512pf "avx512pf" No, 27 Avx512er "avx512er" No,
        28 Avx512cd "avx512cd" Avx512, 29 ShaNi "sha_ni" Host, 30 Avx512bw "avx512bw" Avx512,
        31 Avx512vl "avx512vl" Avx512;
    (0x7, 0, ECX):
        0 Prefetchwt1 "prefetchwt1" No, 1 Avx512vbmi "avx512vbmi" Avx512, 2 Umip "umip" Engine, 3 Pku "pku" No,
        5 Waitpkg "waitpkg" No, 6 Avx512vbmi2 "avx512_vbmi2" Avx512, 7 Shstk "user_shstk" No, 8 Gfni "gfni" Host,
        9 Vaes "vaes" Host, 10 Vpclmulqdq "vpclmulqdq" Host, 11 Avx512vnni "avx512_vnni" Avx512,
        12 Avx512bitalg "avx512_bitalg" Avx512, 13 Tme "tme" No, 14 Avx512vpopcntdq "avx512_vpopcntdq" Avx512,
        16 La57 "la57" No, 22 Rdpid "rdpid" Engine, 23 Keylocker "keylocker" No,
        24 BusLockDetect "bus_lock_detect" No, 25 Cldemote "cldemote" No, 27 Movdiri "movdiri" No,
        28 Movdir64b "movdir64b" No, 29 Enqcmd "enqcmd" No, 30 SgxLc "sgx_lc" No, 31 Pks "pks" No;
    (0x7, 0, EDX):
        2 Avx5124vnniw "avx512_4vnniw" No, 3 Avx5124fmaps "avx512_4fmaps" No, 4 Fsrm "fsrm" Host,
        5 Uintr "uintr" No, 8 Avx512vp2intersect "avx512_vp2intersect" Avx512, 10 MdClear "md_clear" No,
        14 Serialize "serialize" Host, 16 Tsxldtrk "tsxldtrk" No, 18 Pconfig "pconfig" No,
        19 ArchLbr "arch_lbr" No, 20 Ibt "ibt" No, 22 AmxBf16 "amx_bf16" No, 23 Avx512fp16 "avx512_fp16" Avx512,
        24 AmxTile "amx_tile" No, 25 AmxInt8 "amx_int8" No, 26 SpecCtrl "ibrs" No, 27 IntelStibp "stibp" No,
        28 FlushL1d "flush_l1d" No, 29 ArchCapabilities "arch_capabilities" Engine, 31 SpecCtrlSsbd "ssbd" No;
    (0x7, 1, EAX):
        0 Sha512 "sha512" Host, 1 Sm3 "sm3" Host, 2 Sm4 "sm4" Host, 3 RaoInt "rao_int" No,
        4 AvxVnni "avx_vnni" Host, 5 Avx512bf16 "avx512_bf16" Avx512, 6 Lass "lass" No, 7 Cmpccxadd "cmpccxadd" No,
        10 Fzrm "fzrm" Host, 11 Fsrs "fsrs" Host, 12 Fsrc "fsrc" Host, 17 Fred "fred" No, 18 Lkgs "lkgs" No,
        21 AmxFp16 "amx_fp16" No, 22 Hreset "hreset" No, 23 AvxIfma "avx_ifma" Host, 26 Lam "lam" No;
    (0x7, 1, EDX):
        4 AvxVnniInt8 "avx_vnni_int8" Host, 5 AvxNeConvert "avx_ne_convert" Host, 8 AmxComplex "amx_complex" No,
        10 AvxVnniInt16 "avx_vnni_int16" Host, 14 Prefetchi "prefetchi" No, 19 Avx10 "avx10" No;
    (0x7, 2, EDX):
        0 Psfd "psfd" No, 1 IpredCtrl "ipred_ctrl" No, 2 RrsbaCtrl "rrsba_ctrl" No, 3 DdpdU "ddpd_u" No,
        4 BhiCtrl "bhi_ctrl" Engine, 5 McdtNo "mcdt_no" No;
    (0xd, 1, EAX):
        0 Xsaveopt "xsaveopt" No, 1 Xsavec "xsavec" Host, 2 Xgetbv1 "xgetbv1" No, 3 Xsaves "xsaves" No,
        4 Xfd "xfd" No;
    (0x8000_0001, 0, EDX):
        11 Syscall "syscall" Engine, 20 Nx "nx" Engine, 22 Mmxext "mmxext" Host, 25 FxsrOpt "fxsr_opt" No,
        26 Pdpe1gb "pdpe1gb" Engine, 27 Rdtscp "rdtscp" Engine, 29 Lm "lm" Engine, 30 Amd3dnowext "3dnowext" No,
        31 Amd3dnow "3dnow" No;
    (0x8000_0001, 0, ECX):
        0 LahfLm "lahf_lm" Engine, 2 Svm "svm" No, 3 Extapic "extapic" No, 4 Cr8Legacy "cr8_legacy" No,
        5 Abm "abm" Host, 6 Sse4a "sse4a" Host, 7 Misalignsse "misalignsse" No,
        8 Prefetchw "3dnowprefetch" Host, 9 Osvw "osvw" No, 10 Ibs "ibs" No, 11 Xop "xop" No,
        12 Skinit "skinit" No, 13 Wdt "wdt" No, 15 Lwp "lwp" No, 16 Fma4 "fma4" No, 17 Tce "tce" No,
        21 Tbm "tbm" No, 22 Topoext "topoext" EngineAmd, 23 PerfctrCore "perfctr_core" No,
        24 PerfctrNb "perfctr_nb" No, 26 Bpext "bpext" No, 28 PerfctrLlc "perfctr_llc" No, 29 Mwaitx "mwaitx" No;
    (0x8000_0007, 0, EDX):
        8 InvariantTsc "nonstop_tsc" Engine;
    (0x8000_0008, 0, EBX):
        0 Clzero "clzero" No, 1 Irperf "irperf" No, 2 Xsaveerptr "xsaveerptr" Host, 4 Rdpru "rdpru" No,
        9 Wbnoinvd "wbnoinvd" No, 12 AmdIbpb "amd_ibpb" No, 14 AmdIbrs "amd_ibrs" No, 15 AmdStibp "amd_stibp" No,
        24 AmdSsbd "amd_ssbd" No, 25 VirtSsbd "virt_ssbd" No, 26 AmdSsbNo "amd_ssb_no" Engine,
        27 Cppc "cppc" No, 29 BtcNo "btc_no" Engine;
    (0x8000_0021, 0, EAX):
        0 NoNestedDataBp "no_nested_data_bp" EngineAmd, 2 LfenceRdtsc "lfence_rdtsc" EngineAmd,
        6 NullSelClrBase "null_sel_clr_base" EngineAmd, 8 Autoibrs "autoibrs" No, 29 SrsoNo "srso_no" EngineAmd;
    (0x8000_0021, 0, ECX):
        1 TsaSqNo "tsa_sq_no" EngineAmd, 2 TsaL1No "tsa_l1_no" EngineAmd;
}

/// What needs what: a feature without its base is withdrawn (Intel SDM vol. 1, 13.2, 14.3, 15.2-15.4).
pub static NEEDS: &[(Feature, Feature)] = {
    use Feature::{
        Abm, Aes, Avx, Avx2, Avx512bf16, Avx512bitalg, Avx512bw, Avx512cd, Avx512dq, Avx512f, Avx512fp16,
        Avx512ifma, Avx512vbmi, Avx512vbmi2, Avx512vl, Avx512vnni, Avx512vp2intersect, Avx512vpopcntdq,
        AvxIfma, AvxNeConvert, AvxVnni, AvxVnniInt8, AvxVnniInt16, F16c, Fma, Fxsr, Gfni, Lm, Pclmulqdq,
        Pdpe1gb, Popcnt, Sha512, ShaNi, Sm3, Sm4, Sse, Sse2, Sse3, Sse4a, Sse41, Sse42, Ssse3, Syscall, Vaes,
        Vpclmulqdq, Xgetbv1, Xsave, Xsavec, Xsaveopt, Xsaves,
    };
    &[
        (Sse, Fxsr),
        (Sse2, Sse),
        (Sse3, Sse2),
        (Ssse3, Sse3),
        (Sse41, Ssse3),
        (Sse42, Sse41),
        (Sse4a, Sse3),
        (Aes, Sse2),
        (Pclmulqdq, Sse2),
        (ShaNi, Ssse3),
        (Gfni, Sse2),
        (Abm, Popcnt),
        (Xsave, Fxsr),
        (Xsaveopt, Xsave),
        (Xsavec, Xsave),
        (Xgetbv1, Xsave),
        (Xsaves, Xsavec),
        (Avx, Xsave),
        (Avx, Sse42),
        (F16c, Avx),
        (Fma, Avx),
        (Avx2, Avx),
        (Vaes, Avx),
        (Vaes, Aes),
        (Vpclmulqdq, Avx),
        (Vpclmulqdq, Pclmulqdq),
        (AvxVnni, Avx2),
        (AvxIfma, Avx2),
        (AvxVnniInt8, Avx2),
        (AvxVnniInt16, Avx2),
        (AvxNeConvert, Avx2),
        (Sha512, Avx2),
        (Sm3, Avx),
        (Sm4, Avx2),
        (Avx512f, Avx2),
        (Avx512f, Fma),
        (Avx512f, F16c),
        (Avx512dq, Avx512f),
        (Avx512cd, Avx512f),
        (Avx512bw, Avx512f),
        (Avx512vl, Avx512f),
        (Avx512ifma, Avx512f),
        (Avx512vbmi, Avx512bw),
        (Avx512vbmi2, Avx512bw),
        (Avx512vnni, Avx512f),
        (Avx512bitalg, Avx512bw),
        (Avx512vpopcntdq, Avx512f),
        (Avx512bf16, Avx512bw),
        (Avx512fp16, Avx512bw),
        (Avx512vp2intersect, Avx512f),
        (Pdpe1gb, Lm),
        (Syscall, Lm),
    ]
};

/// Features that no guest on hardware is given although the processor may have them: nested virtualization,
/// state that is not carried ([`super::CpuModel::xcr0_mask`], `IA32_XSS`, performance counters), wider linear
/// addresses, and leaves that are not composed.
const NOT_ON_HARDWARE: &[Feature] = {
    use Feature::{
        Amd3dnow, Amd3dnowext, AmxBf16, AmxComplex, AmxFp16, AmxInt8, AmxTile, ArchLbr, Avx10, BusLockDetect,
        Cqm, Enqcmd, Extapic, Fred, Ibs, Ibt, IntelPt, Keylocker, La57, Lam, Lass, Lkgs, Lwp, Monitor, Mpx,
        Mwaitx, Pdcm, PerfctrCore, PerfctrLlc, PerfctrNb, Pks, Pku, RdtA, Sgx, SgxLc, Shstk, Skinit, Smx,
        Svm, Tme, Uintr, Vmx, Waitpkg, Xfd, Xsaves,
    };
    &[
        Amd3dnow,
        Amd3dnowext,
        AmxBf16,
        AmxComplex,
        AmxFp16,
        AmxInt8,
        AmxTile,
        ArchLbr,
        Avx10,
        BusLockDetect,
        Cqm,
        Enqcmd,
        Extapic,
        Fred,
        Ibs,
        Ibt,
        IntelPt,
        Keylocker,
        La57,
        Lam,
        Lass,
        Lkgs,
        Lwp,
        Monitor,
        Mpx,
        Mwaitx,
        Pdcm,
        PerfctrCore,
        PerfctrLlc,
        PerfctrNb,
        Pks,
        Pku,
        RdtA,
        Sgx,
        SgxLc,
        Shstk,
        Skinit,
        Smx,
        Svm,
        Tme,
        Uintr,
        Vmx,
        Waitpkg,
        Xfd,
        Xsaves,
    ]
};

/// Whether a guest on hardware can have the feature of `row`, whose bit the hypervisor says is `on_host`. What our
/// interrupt chip and clocks make is there whatever the hypervisor has.
pub(super) fn on_hardware(row: &Row, on_host: bool) -> bool {
    use Feature::{Arat, Hypervisor, InvariantTsc, TscAdjust, TscDeadline, X2apic};
    match row.feature {
        Arat | Hypervisor | InvariantTsc | TscAdjust | TscDeadline | X2apic => true,
        feature => on_host && !NOT_ON_HARDWARE.contains(&feature),
    }
}

impl Feature {
    /// Its row in [`TABLE`].
    #[must_use]
    pub fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// Its name in `/proc/cpuinfo`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The feature that `/proc/cpuinfo` calls `name`; `sse3`, `lzcnt` and `invtsc` are understood as well.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Feature> {
        let name = match name {
            "sse3" => "pni",
            "lzcnt" => "abm",
            "invtsc" | "constant_tsc" => "nonstop_tsc",
            "sse4.1" => "sse4_1",
            "sse4.2" => "sse4_2",
            name => name,
        };
        TABLE.iter().find(|row| row.name == name).map(|row| row.feature)
    }
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet([u64; 4]);

const _: () = assert!(TABLE.len() <= 256);

impl FeatureSet {
    /// Whether `feature` is in the set.
    #[must_use]
    pub const fn has(&self, feature: Feature) -> bool {
        let index = feature as usize;
        self.0[index / 64] >> (index % 64) & 1 != 0
    }

    /// Puts `feature` in or takes it out.
    pub fn set(&mut self, feature: Feature, present: bool) {
        let index = feature as usize;
        let bit = 1 << (index % 64);
        if present {
            self.0[index / 64] |= bit;
        } else {
            self.0[index / 64] &= !bit;
        }
    }

    /// The features in the set, in the order of the table.
    pub fn iter(&self) -> impl Iterator<Item = Feature> {
        let set = *self;
        TABLE.iter().map(|row| row.feature).filter(move |feature| set.has(*feature))
    }

    /// Takes out whatever lacks its base ([`NEEDS`]), until nothing does.
    pub(super) fn close(&mut self) {
        loop {
            let before = *self;
            for (feature, base) in NEEDS {
                if !self.has(*base) {
                    self.set(*feature, false);
                }
            }
            if *self == before {
                return;
            }
        }
    }
}
