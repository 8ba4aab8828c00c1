use wardian_cpu::bits::{cr4, msr, rflags};
use wardian_cpu::{CpuState, Msr};

use super::*;
use crate::state::{init, restore, save};

#[test]
fn what_is_saved_is_restored() {
    for mut from in [long(0), long(3), legacy(0), legacy(3), real()] {
        from.set_gpr(15, 0x1234);
        let flags = from.rflags();
        from.set_rflags(flags | rflags::OF | rflags::IF);
        from.sys.lstar = 0xffff_ffff_8000_0000;
        from.sys.mtrr_var[3] = 0xf_c000_0800;
        from.sys.mtrr_fixed[10] = 6;
        from.sys.misc_enable = crate::sys::msr::MISC_RESET;
        from.sys.dr[2] = 0x7000;
        from.sys.dr7 = 0x0100_0410;
        from.sys.tsc_adjust = 99;
        from.sys.interrupt_shadow = true;
        let saved = save(&from);
        let mut to = real();
        restore(&mut to, &saved).expect("restorable");
        assert_eq!(save(&to), saved);
        assert_eq!((to.cpl(), to.rip(), to.is_64bit()), (from.cpl(), from.rip(), from.is_64bit()));
        assert_eq!(to.watch.len(), 4, "data breakpoints are armed");
        assert_eq!(to.watch[2], (0x7000, 1, false, true));
    }
}

#[test]
fn reset_is_a_possible_state() {
    let mut core = long(3);
    core.sys.lstar = 0x1234;
    restore(&mut core, &CpuState::reset()).expect("reset");
    assert_eq!((core.cpl(), core.rip(), core.c().rip), (0, 0xfff0, 0xffff_fff0));
    assert_eq!((core.sys.lstar, core.sys.pat), (0, crate::sys::msr::PAT_RESET));
}

#[test]
fn init_keeps_what_the_manual_says() {
    let mut core = long(3);
    core.sys.misc_enable = crate::sys::msr::MISC_RESET;
    core.sys.tsc_adjust = 77;
    core.sys.pat = 0x0606_0606_0606_0606;
    core.sys.mtrr_fixed[1] = 6;
    core.sys.cr0 |= cr0::CD;
    core.sys.lstar = 0x1234;
    init(&mut core).expect("INIT");
    assert_eq!((core.cpl(), core.c().rip, core.protected()), (0, 0xffff_fff0, false));
    assert_eq!((core.sys.tsc_adjust, core.sys.pat, core.sys.mtrr_fixed[1]), (77, 0x0606_0606_0606_0606, 6));
    assert_eq!((core.sys.cr0, core.sys.lstar, core.sys.xcr0), (cr0::CD | cr0::ET, 0, 7));
    assert_eq!(core.gpr(2), u64::from(core.model.signature()));
}

#[test]
fn init_works_on_a_model_without_avx() {
    let mut core = long(0);
    let offer = wardian_cpu::Offer { tsc_hz: 1_000_000_000, ..Default::default() };
    core.model = wardian_cpu::CpuModel::host("x86-64-v2", &offer).expect("model").into();
    core.sys.xcr0 = 1;
    core.sys.misc_enable = crate::sys::msr::MISC_RESET;
    crate::fpu::complete(&mut core);
    init(&mut core).expect("INIT");
}

#[test]
fn impossible_states_are_refused() {
    type Change = fn(&mut CpuState);
    let rows: &[(&str, Change)] = &[
        ("CR0", |s| s.cr0 = cr0::PG),
        ("CR0", |s| s.cr0 |= 1 << 40),
        ("CR0", |s| s.cr0 |= cr0::NW),
        ("CR4", |s| s.cr4 |= cr4::LA57),
        ("EFER", |s| s.efer &= !efer::LMA),
        ("EFER", |s| s.efer |= 1 << 12),
        ("CR3", |s| s.cr3 = 1 << 60),
        ("RFLAGS", |s| s.rflags = 0),
        ("RFLAGS", |s| s.rflags |= 1 << 3),
        ("RFLAGS", |s| s.rflags |= rflags::VM),
        ("CS", |s| s.segments[seg::CS].rights |= 1 << 14),
        ("CS", |s| s.segments[seg::CS].base = 0x1000),
        ("CS", |s| s.segments[seg::CS].rights = 1 << 16),
        ("DS", |s| s.segments[seg::DS].base = 1 << 32),
        ("GS", |s| s.segments[seg::GS].base = 1 << 47),
        ("SS", |s| s.segments[seg::SS].rights |= 1 << 20),
        ("RIP", |s| s.rip = 1 << 47),
        ("TR", |s| s.tr.rights = 0x83),
        ("LDTR", |s| s.ldtr.rights = 0x89),
        ("GDTR", |s| s.gdtr.base = 1 << 47),
        ("XCR0", |s| s.xcr0 = 0),
        ("XCR0", |s| s.xcr0 = 5),
        ("DR6", |s| s.dr[4] = 1 << 32),
        ("DR7", |s| s.dr[5] = 1 << 32),
        ("XSAVE", |s| s.xsave.truncate(575)),
        ("XSTATE_BV", |s| s.xsave[519] = 0x40),
        ("XCOMP_BV", |s| s.xsave[527] = 0x80),
        ("MXCSR", |s| s.xsave[26] = 1),
        ("MSR", |s| s.msrs.push(Msr { index: 0x9999, value: 0 })),
        ("MSR", |s| s.msrs.push(Msr { index: msr::LSTAR, value: 1 << 47 })),
        ("MSR", |s| s.msrs.push(Msr { index: msr::PAT, value: 3 })),
    ];
    let mut from = long(0);
    from.sys.misc_enable = crate::sys::msr::MISC_RESET;
    let good = save(&from);
    for (n, (field, change)) in rows.iter().enumerate() {
        let mut state = good.clone();
        change(&mut state);
        let mut core = real();
        let before = save(&core);
        let error = restore(&mut core, &state).expect_err(field);
        assert_eq!(error.field, *field, "row {n}: {error}");
        assert_eq!(save(&core), before, "nothing has changed");
    }
}
