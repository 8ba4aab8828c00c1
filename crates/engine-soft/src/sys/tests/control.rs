use wardian_cpu::bits::{cr4, msr, rflags};
use wardian_cpu::{Activity, Exit};
use wardian_time::Nanos;
use wardian_time::paravirt as pv;

use super::*;
use crate::sys::control::{popped_flags, write_cr0, write_cr3, write_cr4};
use crate::sys::{msr as registers, paravirt};

const PG: u64 = cr0::PG;
const PE: u64 = cr0::PE;

#[test]
fn cr0_rules() {
    // (what, start, value, fault)
    let rows: Vec<(&str, Box<Core>, u64, bool)> = vec![
        ("paging without protection", real(), PG, true),
        ("NW without CD", legacy(0), PE | cr0::NW, true),
        ("upper half", long(0), 1 << 32 | PE | PG, true),
        ("leave long mode from 64-bit code", long(0), PE, true),
        ("paging on, 32-bit", legacy(0), PE | PG, false),
        ("protection on", real(), PE, false),
        ("protection off", legacy(0), 0, false),
        ("unknown low bits are dropped", legacy(0), PE | 0x40, false),
    ];
    for (what, mut core, value, faults) in rows {
        let before = core.sys.cr0;
        let got = fault(write_cr0(&mut core, value));
        assert_eq!(got, if faults { gp(0) } else { None }, "{what}");
        let want = if faults { before } else { (value | cr0::ET) & !0x40 };
        assert_eq!(core.sys.cr0, want, "{what}");
    }
}

#[test]
fn entering_and_leaving_long_mode() {
    let mut core = legacy(0);
    core.sys.efer = efer::LME;
    assert_eq!(fault(write_cr0(&mut core, PE | PG)), gp(0), "no PAE");
    core.sys.cr4 = cr4::PAE;
    write_cr0(&mut core, PE | PG).expect("long mode");
    assert!(core.long_mode() && !core.is_64bit());
    assert_eq!(fault(write_cr4(&mut core, 0)), gp(0), "PAE must stay");
    assert_eq!(fault(registers::write(&mut core, msr::EFER, 0)), gp(0), "LME is locked");
    write_cr4(&mut core, cr4::PAE | cr4::PCIDE).expect("PCIDE");
    assert_eq!(fault(write_cr0(&mut core, PE)), gp(0), "PCIDE");
    write_cr4(&mut core, cr4::PAE).expect("no PCIDE");
    write_cr0(&mut core, PE).expect("out of long mode");
    assert!(!core.long_mode());
    assert_eq!(core.sys.efer, efer::LME);
    // A 16-bit TSS or 64-bit code forbid it.
    core.sys.tr.rights = 0x83;
    assert_eq!(fault(write_cr0(&mut core, PE | PG)), gp(0));
}

#[test]
fn cr3_and_cr4_rules() {
    let mut core = long(0);
    let wide = 1u64 << core.model.physical_bits();
    assert_eq!(fault(write_cr3(&mut core, wide)), gp(0));
    assert_eq!(fault(write_cr3(&mut core, 1 << 63)), gp(0), "no PCIDE");
    let cr3 = core.sys.cr3;
    core.sys.cr3 |= 5;
    let on = core.sys.cr4 | cr4::PCIDE;
    assert_eq!(fault(write_cr4(&mut core, on)), gp(0), "CR3 names a PCID");
    core.sys.cr3 = cr3;
    write_cr4(&mut core, on).expect("PCIDE");
    write_cr3(&mut core, 1 << 63 | cr3 | 7).expect("no flush");
    assert_eq!(core.sys.cr3, cr3 | 7);
    for reserved in [1 << 15, 1 << 19, 1 << 31, 1 << 40, cr4::LA57, cr4::VME] {
        assert_eq!(fault(write_cr4(&mut core, on | reserved)), gp(0), "{reserved:#x}");
    }
    let mut core = legacy(0);
    assert_eq!(fault(write_cr4(&mut core, cr4::PCIDE)), gp(0));
    // PAE with a reserved bit in a present PDPTE.
    core.sys.cr4 = cr4::PAE;
    core.sys.cr3 = 0x7000;
    poke(&core, 0x7008, &(1u64 | 1 << 1).to_le_bytes());
    assert_eq!(fault(write_cr0(&mut core, PE | PG)), gp(0));
    poke(&core, 0x7008, &1u64.to_le_bytes());
    assert_eq!(fault(write_cr0(&mut core, PE | PG)), None);
}

#[test]
fn moves_and_their_privilege() {
    let mut core = long(0);
    core.set_gpr(0, 0x1234);
    once(&mut core, &[0x0f, 0x22, 0xd0]).expect("mov cr2, rax");
    once(&mut core, &[0x0f, 0x20, 0xd3]).expect("mov rbx, cr2");
    assert_eq!((core.sys.cr2, core.gpr(3)), (0x1234, 0x1234));
    assert_eq!(fault(once(&mut core, &[0x44, 0x0f, 0x22, 0xc0])), gp(0), "CR8 above 15");
    core.set_gpr(0, 15);
    once(&mut core, &[0x44, 0x0f, 0x22, 0xc0]).expect("mov cr8, rax");
    for bytes in [
        &[0x0f, 0x20, 0xc0][..], // mov rax, cr0
        &[0x0f, 0x21, 0xf8],     // mov rax, dr7
        &[0x0f, 0x06],           // clts
        &[0x0f, 0x09],           // wbinvd
        &[0x0f, 0x32],           // rdmsr
        &[0x0f, 0x30],           // wrmsr
        &[0xf4],                 // hlt
        &[0x0f, 0x01, 0x38],     // invlpg [rax]
        &[0x0f, 0x01, 0xf0],     // lmsw ax
        &[0x0f, 0x01, 0xd1],     // xsetbv
        &[0xfa],                 // cli
        &[0xfb],                 // sti
    ] {
        assert_eq!(fault(once(&mut long(3), bytes)), gp(0), "{bytes:x?}");
    }
    for bytes in [
        &[0x0f, 0x01, 0xcb][..], // stac
        &[0x0f, 0x0b],           // ud2
        &[0x0f, 0xaa],           // rsm
        &[0x0f, 0x01, 0xc8],     // monitor
        &[0x0f, 0x01, 0xc2],     // vmlaunch
        &[0x0f, 0x01, 0xd8],     // vmrun
    ] {
        assert_eq!(fault(once(&mut long(3), bytes)), UD, "{bytes:x?}");
    }
    let mut core = legacy(0);
    core.set_gpr(0, 0xfffe);
    once(&mut core, &[0x0f, 0x01, 0xf0]).expect("lmsw ax");
    assert_eq!(core.sys.cr0 & 0xf, 0xf, "LMSW cannot clear PE");
    once(&mut core, &[0x0f, 0x06]).expect("clts");
    assert_eq!(core.sys.cr0 & cr0::TS, 0);
    once(&mut core, &[0x0f, 0x01, 0xe1]).expect("smsw ecx");
    assert_eq!(core.gpr(1), core.sys.cr0);
}

#[test]
fn flags_that_popf_may_change() {
    let all = 0x003f_7fd7;
    let arith = 0x4dd7; // arithmetic, TF, DF, NT, bit 1
    let (ac, id) = (rflags::AC, rflags::ID);
    // (core, IOPL, size, result of popping all ones into 2)
    let rows: Vec<(&str, Box<Core>, u64, u8, u64)> = vec![
        ("real 16", real(), 0, 2, arith | 0x3200),
        ("real 32", real(), 0, 4, arith | 0x3200 | ac | id),
        ("level 0", legacy(0), 0, 4, arith | 0x3200 | ac | id),
        ("level 3", legacy(3), 0, 4, arith | ac | id),
        ("level 3, IOPL 3", legacy(3), 3, 4, arith | 0x3200 | ac | id),
        ("level 3, 16 bits", long(3), 0, 2, arith),
        ("64 bits", long(0), 0, 8, arith | 0x3200 | ac | id),
    ];
    for (what, mut core, iopl, size, want) in rows {
        core.set_rflags(rflags::FIXED | iopl << 12);
        assert_eq!(popped_flags(&core, all, size), want | iopl << 12, "{what}");
        core.set_rflags(rflags::FIXED | rflags::IF | rflags::VIF | rflags::RF | iopl << 12);
        let cleared = popped_flags(&core, 0, size);
        assert_eq!(cleared & rflags::RF, 0, "{what}");
        let keeps_if = core.cpl() == 3 && iopl == 0;
        assert_eq!(cleared & rflags::IF != 0, keeps_if, "{what}");
        assert_eq!(cleared & rflags::VIF != 0, size == 2, "{what}");
    }
    let mut core = long(0);
    core.set_rflags(0x1_0246);
    once(&mut core, &[0x9c]).expect("pushfq");
    assert_eq!(u64_at(&core, core.gpr(4)), 0x246, "RF is pushed clear");
    poke(&core, core.gpr(4), &(all | 1 << 40).to_le_bytes());
    once(&mut core, &[0x9d]).expect("popfq");
    assert_eq!((core.rflags(), core.gpr(4)), (arith | 0x3200 | ac | id, STACK));
}

#[test]
fn interrupt_flag_and_halt() {
    let mut core = long(0);
    once(&mut core, &[0xfb]).expect("sti");
    assert!(core.sys.interrupt_shadow && core.rflags() & rflags::IF != 0);
    once(&mut core, &[0xfb]).expect("sti again");
    assert!(!core.sys.interrupt_shadow, "only the first STI holds interrupts off");
    once(&mut core, &[0xf4]).expect("hlt");
    assert_eq!(core.sys.activity, Activity::Halted);
    assert_eq!(core.out.pop_front(), Some(Exit::Halt));
    assert_eq!(core.rip(), CODE + 3);
    let mut core = legacy(3);
    core.set_rflags(rflags::FIXED | rflags::IOPL);
    once(&mut core, &[0xfb]).expect("IOPL 3");
}

#[test]
fn debug_registers() {
    let mut core = long(0);
    core.set_gpr(0, 0x7004);
    once(&mut core, &[0x0f, 0x23, 0xc0]).expect("mov dr0, rax");
    assert!(core.watch.is_empty());
    core.set_gpr(0, 0x000d_0001 | 1 << 12); // L0, write, 4 bytes; a reserved bit
    once(&mut core, &[0x0f, 0x23, 0xf8]).expect("mov dr7, rax");
    assert_eq!(core.sys.dr7, 0x000d_0401);
    assert_eq!(core.watch[..1], [(0x7004, 4, false, true)]);
    core.set_gpr(0, 0);
    once(&mut core, &[0x0f, 0x23, 0xf0]).expect("mov dr6, rax");
    assert_eq!(core.sys.dr6, 0xffff_0ff0);
    once(&mut core, &[0x0f, 0x21, 0xe1]).expect("mov rcx, dr4: an alias");
    assert_eq!(core.gpr(1), 0xffff_0ff0);
    core.sys.cr4 |= cr4::DE;
    assert_eq!(fault(once(&mut core, &[0x0f, 0x21, 0xe1])), UD);
    core.set_gpr(0, 1 << 32);
    assert_eq!(fault(once(&mut core, &[0x0f, 0x23, 0xf8])), gp(0));
    core.set_gpr(0, 0x400);
    once(&mut core, &[0x0f, 0x23, 0xf8]).expect("off");
    assert!(core.watch.is_empty());
    core.sys.dr7 |= 1 << 13;
    assert_eq!(once(&mut core, &[0x0f, 0x21, 0xf8]), Err(Trap::db(1 << 13)), "GD");
}

#[test]
fn extended_control_register() {
    let mut core = long(0);
    let allowed = core.model.xcr0_mask();
    for value in [0u64, 1, 2, 3, 5, 7, 0x17, 0x27, 1 << 63] {
        core.set_gpr(0, value & 0xffff_ffff);
        core.set_gpr(2, value >> 32);
        core.set_gpr(1, 0);
        let good = matches!(value, 1 | 3 | 7) && value & !allowed == 0;
        assert_eq!(
            fault(once(&mut core, &[0x0f, 0x01, 0xd1])),
            if good { None } else { gp(0) },
            "{value:#x}"
        );
    }
    once(&mut core, &[0x0f, 0x01, 0xd0]).expect("xgetbv");
    assert_eq!(core.gpr(0), core.sys.xcr0);
    core.set_gpr(1, 1);
    assert_eq!(fault(once(&mut core, &[0x0f, 0x01, 0xd0])), gp(0));
    core.sys.cr4 &= !cr4::OSXSAVE;
    assert_eq!(fault(once(&mut core, &[0x0f, 0x01, 0xd0])), UD);
}

#[test]
fn model_specific_registers() {
    let mut core = long(0);
    let not_canonical = 1 << 47;
    // (register, value, accepted)
    let rows = [
        (msr::LSTAR, 0xffff_ffff_8000_0000, true),
        (msr::LSTAR, not_canonical, false),
        (msr::CSTAR, not_canonical, false),
        (msr::KERNEL_GS_BASE, not_canonical, false),
        (msr::GS_BASE, not_canonical, false),
        (msr::FS_BASE, 0x7fff_1234_5000, true),
        (msr::SYSENTER_EIP, not_canonical, false),
        (msr::PAT, 0x0007_0506_0007_0106, true),
        (msr::PAT, 0x0007_0506_0007_0306, false),
        (msr::MTRR_DEF_TYPE, 0xc06, true),
        (msr::MTRR_DEF_TYPE, 0xc02, false),
        (msr::MTRR_DEF_TYPE, 0x1006, false),
        (0x200, 0xc000_0000, true),
        (0x200, 0xc000_0007, false),
        (0x201, 0xf_c000_0800, true),
        (0x250, 0x0606_0606_0606_0606, true),
        (0x250, 0x0606_0602_0606_0606, false),
        (msr::EFER, efer::SCE | efer::LME | efer::LMA | efer::NXE, true),
        (msr::EFER, efer::SCE | efer::LME | 1 << 1, false),
        (msr::EFER, efer::SCE, false),
        (msr::STAR, u64::MAX, true),
        (msr::TSC_AUX, 7, true),
        (msr::BIOS_SIGN_ID, 0, true),
        (msr::PRED_CMD, 1, false),
        (msr::XSS, 1, false),
        (msr::MTRRCAP, 0, false),
        (0x1234_5678, 0, false),
    ];
    for (index, value, accepted) in rows {
        core.set_gpr(1, u64::from(index));
        core.set_gpr(0, value & 0xffff_ffff);
        core.set_gpr(2, value >> 32);
        let got = fault(once(&mut core, &[0x0f, 0x30]));
        assert_eq!(got, if accepted { None } else { gp(0) }, "WRMSR {index:#x} {value:#x}");
        if accepted && index != msr::BIOS_SIGN_ID {
            once(&mut core, &[0x0f, 0x32]).expect("rdmsr");
            assert_eq!(core.gpr(2) << 32 | core.gpr(0), value, "RDMSR {index:#x}");
        }
    }
    assert_eq!(core.c().seg_base[seg::FS], 0x7fff_1234_5000);
    // Registers of the local APIC are the machine's.
    core.set_gpr(1, 0x802);
    assert_eq!(once(&mut core, &[0x0f, 0x32]), Err(Trap::Exit(Exit::MsrRead { index: 0x802 })));
    core.journal.push(5);
    once(&mut core, &[0x0f, 0x32]).expect("answered");
    assert_eq!(core.gpr(0), 5);
    for index in [0x1b, 0x8b, 0xfe, 0x179, 0x17a, 0x1a0, 0x400, 0x401, 0x17, 0xce, 0x198] {
        if index != 0x1b {
            assert!(registers::read(&mut core, index).is_ok(), "{index:#x}");
        }
    }
}

#[test]
fn time_stamp_counter() {
    let mut core = long(0);
    core.time.resume(wardian_time::ResumePolicy::Freeze);
    core.time.advance(Nanos(1000));
    let start = core.tsc();
    core.set_gpr(0, u64::MAX);
    once(&mut core, &[0x0f, 0x31]).expect("rdtsc");
    assert_eq!((core.gpr(0), core.gpr(2)), (start, 0));
    registers::write(&mut core, msr::TSC, 5_000_000_000).expect("tsc");
    assert_eq!(registers::read(&mut core, msr::TSC), Ok(5_000_000_000));
    assert_eq!(registers::read(&mut core, msr::TSC_ADJUST), Ok(5_000_000_000 - start));
    registers::write(&mut core, msr::TSC_ADJUST, 10).expect("adjust");
    assert_eq!(core.tsc(), start + 10);
    // The machine is told, and keeps deadlines in this vCPU's TSC.
    let told = |value| Exit::MsrWrite { index: msr::TSC_ADJUST, value };
    assert_eq!(core.out, [told(5_000_000_000 - start), told(10)]);
    let ask = registers::write(&mut core, msr::TSC_DEADLINE, 5010);
    assert_eq!(ask, Err(Trap::Exit(Exit::MsrWrite { index: msr::TSC_DEADLINE, value: 5010 })));
    let mut core = long(3);
    once(&mut core, &[0x0f, 0x31]).expect("rdtsc in user mode");
    core.sys.cr4 |= cr4::TSD;
    assert_eq!(fault(once(&mut core, &[0x0f, 0x31])), gp(0));
    core.sys.tsc_aux = 9;
    once(&mut core, &[0xf3, 0x0f, 0xc7, 0xf9]).expect("rdpid rcx");
    assert_eq!(core.gpr(1), 9);
    assert_eq!(fault(once(&mut core, &[0x0f, 0x33])), gp(0), "rdpmc");
}

#[test]
fn invalidations() {
    let mut core = long(0);
    core.set_gpr(0, 1 << 47);
    once(&mut core, &[0x0f, 0x01, 0x38]).expect("invlpg of a non-canonical address does nothing");
    core.set_gpr(3, 0x7000);
    let mut run = |kind: u64, pcid: u64, linear: u64| {
        core.set_gpr(0, kind);
        poke(&core, 0x7000, &pcid.to_le_bytes());
        poke(&core, 0x7008, &linear.to_le_bytes());
        fault(once(&mut core, &[0x66, 0x0f, 0x38, 0x82, 0x03]))
    };
    assert_eq!(run(0, 0, 0x1000), None);
    assert_eq!(run(0, 0, 1 << 47), gp(0));
    assert_eq!(run(0, 1, 0x1000), gp(0), "no PCIDE");
    assert_eq!(run(1, 0, 0), None);
    assert_eq!(run(2, 0x1000, 0), gp(0), "reserved");
    assert_eq!(run(2, 0, 0), None);
    assert_eq!(run(3, 0, 0), None);
    assert_eq!(run(4, 0, 0), gp(0));
}

#[test]
fn hypercalls() {
    let mut core = long(0);
    for (n, value) in [(0, 9), (3, 1), (1, 2), (2, 3), (6, 4)] {
        core.set_gpr(n, value);
    }
    let exit = Exit::Hypercall { number: 9, args: [1, 2, 3, 4] };
    assert_eq!(once(&mut core, &[0x0f, 0x01, 0xc1]), Err(Trap::Exit(exit)));
    core.journal.push(77);
    once(&mut core, &[0x0f, 0x01, 0xd9]).expect("vmmcall, answered");
    assert_eq!(core.gpr(0), 77);
    let mut core = long(3);
    once(&mut core, &[0x0f, 0x01, 0xc1]).expect("vmcall in user mode");
    assert_eq!(core.gpr(0), u64::MAX);
}

#[test]
fn cpuid_follows_the_state() {
    let mut core = long(0);
    core.sys.cr4 |= cr4::OSXSAVE;
    for (osxsave, want) in [(true, 1), (false, 0)] {
        core.sys.cr4 = if osxsave { core.sys.cr4 | cr4::OSXSAVE } else { core.sys.cr4 & !cr4::OSXSAVE };
        core.set_gpr(0, 0xffff_ffff_0000_0001);
        core.set_gpr(3, u64::MAX);
        once(&mut core, &[0x0f, 0xa2]).expect("cpuid");
        assert_eq!(core.gpr(1) >> 27 & 1, want);
        assert_eq!(core.gpr(3) >> 32, 0);
        assert_eq!(core.gpr(0), u64::from(core.model.signature()));
    }
}

#[test]
fn paravirtual_clock() {
    let mut core = long(0);
    let version = |core: &Core, at| u32_at(core, at);
    assert_eq!(fault(registers::write(&mut core, pv::MSR_SYSTEM_TIME, 0x80_0000 | 1)), gp(0), "not RAM");
    registers::write(&mut core, pv::MSR_SYSTEM_TIME, 0x7020 | 1).expect("clock");
    assert_eq!(version(&core, 0x7020), 2);
    let scale = core.time.pvclock().scale;
    assert_eq!(u32_at(&core, 0x7020 + 24), scale.mul);
    assert_eq!(peek(&core, 0x7020 + 28, 2), [scale.shift as u8, 1]);
    paravirt::refresh(&core, Nanos(0), true);
    assert_eq!((version(&core, 0x7020), peek(&core, 0x7020 + 29, 1)[0]), (4, 3), "stopped");
    // An adjusted TSC: the record follows it, and is not stable across vCPUs. The flag stays until cleared.
    registers::write(&mut core, msr::TSC_ADJUST, 500).expect("adjust");
    assert_eq!(u64_at(&core, 0x7020 + 8), 500);
    assert_eq!(peek(&core, 0x7020 + 29, 1)[0], 2);

    registers::write(&mut core, pv::MSR_WALL_CLOCK, 0x7100).expect("wall clock");
    assert_eq!(version(&core, 0x7100), 2);

    assert_eq!(fault(registers::write(&mut core, pv::MSR_STEAL_TIME, 0x7203)), gp(0), "reserved bits");
    registers::write(&mut core, pv::MSR_STEAL_TIME, 0x7200 | 1).expect("steal time");
    paravirt::refresh(&core, Nanos(100), false);
    paravirt::refresh(&core, Nanos(20), false);
    assert_eq!(u64_at(&core, 0x7200), 120);
    assert_eq!(version(&core, 0x7208) % 2, 0);
    registers::write(&mut core, pv::MSR_STEAL_TIME, 0).expect("off");
    paravirt::refresh(&core, Nanos(5), false);
    assert_eq!(u64_at(&core, 0x7200), 120);
}
