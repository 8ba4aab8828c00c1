use wardian_cpu::bits::{efer, rflags};
use wardian_cpu::{CpuModel, Offer};

use super::*;
use crate::sys::transfer::returned_flags;

fn push64(core: &Core, values: &[u64]) {
    for (n, value) in values.iter().enumerate() {
        poke(core, core.gpr(4) + n as u64 * 8, &value.to_le_bytes());
    }
}

fn push32(core: &Core, values: &[u32]) {
    for (n, value) in values.iter().enumerate() {
        poke(core, core.gpr(4) + n as u64 * 4, &value.to_le_bytes());
    }
}

const IRETQ: &[u8] = &[0x48, 0xcf];

#[test]
fn iret_to_64_bit_user() {
    let mut core = long(0);
    core.sys.nmi_blocked = true;
    push64(&core, &[USER + 8, USER_CODE64.into(), 0x3202, USER_STACK, USER_DATA.into()]);
    once(&mut core, IRETQ).expect("iretq");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (3, USER + 8, USER_STACK));
    assert_eq!(core.rflags(), 0x3202, "level 0 may change IOPL and IF");
    assert!(!core.sys.nmi_blocked);
    // The kernel's data segments do not come along.
    assert!(core.sys.segments[seg::DS].unusable());
}

#[test]
fn iret_to_compatibility_mode_and_kernel() {
    let mut core = long(0);
    push64(&core, &[0x1234, USER_CODE32.into(), 2, 0x9_0000_8000, USER_DATA.into()]);
    once(&mut core, IRETQ).expect("iretq");
    assert!(!core.is_64bit() && core.long_mode());
    assert_eq!((core.rip(), core.gpr(4)), (0x1234, 0x8000));
    // To the kernel itself with a null SS, and with RF.
    let mut core = long(0);
    push64(&core, &[HANDLER, KERNEL_CODE64.into(), 0x1_0046, 0x1238, 0]);
    once(&mut core, IRETQ).expect("iretq");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (0, HANDLER, 0x1238));
    assert_eq!(core.rflags(), 0x1_0046);
    assert!(!core.sys.segments[seg::DS].unusable());
}

#[test]
fn irets_that_fault() {
    let good = [USER, u64::from(USER_CODE64), 2, USER_STACK, u64::from(USER_DATA)];
    // (what, field, value, fault)
    let rows = [
        ("RIP not canonical", 0, 1 << 47, gp(0)),
        ("null CS", 1, 3, gp(0)),
        ("CS beyond", 1, u64::from(BEYOND) | 3, gp(0xa8)),
        ("CS is data", 1, u64::from(USER_DATA), gp(0x20)),
        ("CS RPL is not DPL", 1, 0x2a, gp(0x28)),
        ("CS with L and D", 1, u64::from(BOTH_SIZES), gp(0xa0)),
        ("SS null at level 3", 4, 3, gp(0)),
        ("SS null at level 3, RPL 0", 4, 0, gp(0)),
        ("SS of the kernel", 4, u64::from(KERNEL_DATA) | 3, gp(0x10)),
        ("SS RPL", 4, 0x20, gp(0x20)),
        ("SS read-only", 4, u64::from(READ_ONLY), gp(0x50)),
        ("SS absent", 4, 0x63, Some((12, Some(0x60)))),
    ];
    for (what, field, value, want) in rows {
        let mut core = long(0);
        if what == "SS absent" {
            set_descriptor(&core, ABSENT, 0x00cf_7300_0000_ffff);
        }
        let mut frame = good;
        frame[field] = value;
        push64(&core, &frame);
        assert_eq!(fault(once(&mut core, IRETQ)), want, "{what}");
        assert_eq!((core.rip(), core.gpr(4), core.cpl()), (CODE, STACK, 0), "{what}");
    }
    let mut core = long(0);
    core.set_rflags(rflags::FIXED | rflags::NT);
    assert_eq!(fault(once(&mut core, IRETQ)), gp(0), "NT");
    let mut core = long(0);
    core.set_gpr(4, HOLE - 16);
    assert_eq!(fault(once(&mut core, IRETQ)), Some((14, Some(0))), "stack not mapped");
    let mut core = long(3);
    push64(&core, &[USER, KERNEL_CODE64.into(), 2, USER_STACK, KERNEL_DATA.into()]);
    assert_eq!(fault(once(&mut core, IRETQ)), gp(8), "inwards");
}

#[test]
fn iret_in_protected_and_real_mode() {
    let mut core = legacy(0);
    push32(&core, &[USER as u32, USER_CODE32.into(), 0x202, USER_STACK as u32, USER_DATA.into()]);
    once(&mut core, &[0xcf]).expect("iretd");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (3, USER, USER_STACK));
    let mut core = legacy(0);
    push32(&core, &[HANDLER as u32, KERNEL_CODE32.into(), 0x202]);
    once(&mut core, &[0xcf]).expect("iretd");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (0, HANDLER, STACK + 12));
    // User code cannot change IF or IOPL.
    let mut core = legacy(3);
    push32(&core, &[USER as u32 + 4, USER_CODE32.into(), 0x3ed7]);
    once(&mut core, &[0xcf]).expect("iretd");
    assert_eq!((core.rip(), core.rflags()), (USER + 4, 0xcd7));
    // Beyond the limit of a 16-bit segment.
    let mut core = legacy(0);
    push32(&core, &[0x1_0000, CODE16.into(), 2]);
    assert_eq!(fault(once(&mut core, &[0xcf])), gp(0));

    let mut core = real();
    poke(&core, STACK, &[0x00, 0x01, 0x00, 0x20, 0x02, 0x32]);
    once(&mut core, &[0xcf]).expect("iret");
    assert_eq!((core.c().rip, core.gpr(4), core.rflags()), (0x2_0100, STACK + 6, 0x3202));
}

#[test]
fn flags_that_iret_may_change() {
    let all = 0x003f_7fd7;
    let rows = [
        // (old, popped, size, level, new)
        (2, all, 8, 0, all & !rflags::VM),
        (2, all, 4, 3, 0x0025_4dd7),
        (2 | rflags::IOPL, all, 4, 3, 0x0025_7fd7),
        (2, all, 2, 0, 0x7fd7),
        (2 | rflags::AC | rflags::ID, 0, 2, 3, 2 | rflags::AC | rflags::ID),
        (2 | rflags::IF, 0, 4, 3, 2 | rflags::IF),
        (2 | rflags::IF, 0, 4, 0, 2),
        (all & !rflags::VM, 2, 4, 0, 2),
    ];
    for (old, popped, size, cpl, want) in rows {
        assert_eq!(returned_flags(old, popped, size, cpl), want, "{old:#x} {popped:#x} {size} {cpl}");
    }
}

#[test]
fn far_jumps() {
    // (what, level, selector, fault)
    let np = |code| Some((11, Some(code)));
    let rows = [
        ("same level", 0, KERNEL_CODE32, None),
        ("conforming from outside", 3, CONFORMING | 3, None),
        ("inner level", 3, KERNEL_CODE32 | 3, gp(0x40)),
        ("outer level", 0, USER_CODE32, gp(0x18)),
        ("null", 0, 3, gp(0)),
        ("data", 0, KERNEL_DATA, gp(0x10)),
        ("beyond", 0, BEYOND, gp(0xa8)),
        ("LDT descriptor", 0, LDT_SELECTOR, gp(0x68)),
        ("busy TSS", 0, TSS_SELECTOR, gp(0x30)),
        ("absent code", 0, UNTOUCHED, np(0x98)),
    ];
    for (what, cpl, selector, want) in rows {
        let mut core = legacy(cpl);
        if what == "absent code" {
            set_descriptor(&core, UNTOUCHED, 0x00cf_1b00_0000_ffff);
        }
        let [low, high] = selector.to_le_bytes();
        let code = [0xea, 0, 0, 0x21, 0, low, high];
        assert_eq!(fault(once(&mut core, &code)), want, "{what}");
        if want.is_none() {
            assert_eq!((core.rip(), core.cpl()), (0x21_0000, cpl), "{what}");
            assert_eq!(core.sys.segments[seg::CS].selector & 3, u16::from(cpl), "{what}");
        }
    }
    let mut core = legacy(0);
    let limit = [0xea, 0, 0, 0x21, 0, CODE16 as u8, 0];
    assert_eq!(fault(once(&mut core, &limit)), gp(0), "beyond the limit");
    // From compatibility mode to 64-bit mode and back, through memory.
    let mut core = long(0);
    core.set_gpr(3, 0x7000);
    poke(&core, 0x7000, &[0, 0, 1, 0, KERNEL_CODE32 as u8, 0]);
    once(&mut core, &[0xff, 0x2b]).expect("jmp far [rbx]");
    assert!(!core.is_64bit());
    once(&mut core, &[0xea, 0, 0, 1, 0, KERNEL_CODE64 as u8, 0]).expect("jmp far");
    assert!(core.is_64bit());
    assert_eq!(core.rip(), 0x1_0000);
    // Real mode.
    let mut core = real();
    once(&mut core, &[0xea, 0x34, 0x12, 0x00, 0xf0]).expect("jmp far");
    assert_eq!((core.rip(), core.c().rip), (0x1234, 0xf_1234));
}

#[test]
fn far_calls_and_returns() {
    let mut core = legacy(0);
    once(&mut core, &[0x9a, 0, 0, 1, 0, KERNEL_CODE32 as u8, 0]).expect("call far");
    assert_eq!((core.rip(), core.gpr(4)), (HANDLER, STACK - 8));
    assert_eq!(u64_at(&core, STACK - 8), u64::from(KERNEL_CODE32) << 32 | (CODE + 7));
    once(&mut core, &[0xca, 4, 0]).expect("retf 4");
    assert_eq!((core.rip(), core.gpr(4)), (CODE + 7, STACK + 4));

    // Through a call gate with two parameters, and back to the outer level.
    let mut core = legacy(3);
    set_descriptor(&core, GATE, gate(KERNEL_CODE32, HANDLER, 0xec) | 2 << 32);
    push32(&core, &[0xaaaa, 0xbbbb]);
    once(&mut core, &[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]).expect("call gate");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (0, HANDLER, RING0_STACK - 24));
    let frame: Vec<u32> = (0..6).map(|n| u32_at(&core, core.gpr(4) + n * 4)).collect();
    assert_eq!(
        frame,
        [USER as u32 + 7, USER_CODE32.into(), 0xaaaa, 0xbbbb, USER_STACK as u32, USER_DATA.into()]
    );
    crate::sys::descriptor::load(&mut core, seg::DS, KERNEL_DATA).expect("kernel data");
    once(&mut core, &[0xca, 8, 0]).expect("retf 8");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (3, USER + 7, USER_STACK + 8));
    assert!(core.sys.segments[seg::DS].unusable(), "kernel data does not come along");
    assert_eq!(core.sys.segments[seg::ES].selector, USER_DATA);

    // The gate's own privilege.
    let mut core = legacy(3);
    set_descriptor(&core, GATE, gate(KERNEL_CODE32, HANDLER, 0x8c));
    assert_eq!(fault(once(&mut core, &[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0])), gp(0x78));

    // A 64-bit call gate.
    let mut core = long(3);
    set_descriptor(&core, GATE, gate(KERNEL_CODE64, HANDLER, 0xec));
    poke(&core, GDT + 0x80, &0xffff_8000u64.to_le_bytes());
    core.set_gpr(3, USER + 0x1000);
    poke(&core, USER + 0x1000, &[0, 0, 0, 0, GATE as u8 | 3, 0]);
    once(&mut core, &[0xff, 0x1b]).expect("call far [rbx]");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (0, 0xffff_8000_0001_0000, RING0_STACK - 32));
    let frame: Vec<u64> = (0..4).map(|n| u64_at(&core, core.gpr(4) + n * 8)).collect();
    assert_eq!(frame, [USER + 2, USER_CODE64.into(), USER_STACK, USER_DATA.into()]);
    once(&mut core, &[0x48, 0xcb]).expect("retfq");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (3, USER + 2, USER_STACK));
}

#[test]
fn far_returns_that_fault() {
    let mut core = legacy(3);
    push32(&core, &[HANDLER as u32, KERNEL_CODE32.into()]);
    assert_eq!(fault(once(&mut core, &[0xcb])), gp(0x40), "inwards");
    let mut core = legacy(0);
    push32(&core, &[USER as u32, USER_CODE32.into(), USER_STACK as u32, KERNEL_DATA.into()]);
    assert_eq!(fault(once(&mut core, &[0xcb])), gp(0x10), "stack of another level");
    assert_eq!((core.cpl(), core.gpr(4)), (0, STACK));
}

#[test]
fn task_switch_by_jump_and_call() {
    let prepare = |core: &Core| {
        poke(core, TASK + 0x20, &(USER as u32).to_le_bytes());
        poke(core, TASK + 0x24, &2u32.to_le_bytes());
        poke(core, TASK + 0x38, &(USER_STACK as u32).to_le_bytes());
        for (at, selector) in [(0x48, USER_DATA), (0x4c, USER_CODE32), (0x50, USER_DATA)] {
            poke(core, TASK + at, &u32::from(selector).to_le_bytes());
        }
    };
    let mut core = legacy(0);
    prepare(&core);
    once(&mut core, &[0xea, 0, 0, 0, 0, TASK_SELECTOR as u8, 0]).expect("jmp to a TSS");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4), core.rflags()), (3, USER, USER_STACK, 2));
    assert_eq!(u32_at(&core, TSS + 0x20), CODE as u32 + 7);
    assert_eq!(descriptor_at(&core, TSS_SELECTOR) >> 41 & 1, 0);
    assert_eq!(descriptor_at(&core, TASK_SELECTOR) >> 41 & 1, 1);

    let mut core = legacy(0);
    prepare(&core);
    poke(&core, TASK + 0x50, &u32::from(KERNEL_DATA).to_le_bytes());
    let got = fault(once(&mut core, &[0x9a, 0, 0, 0, 0, TASK_SELECTOR as u8, 0]));
    assert_eq!(got, Some((10, Some(0x10))), "the new task's stack is wrong");
    assert_eq!((core.rip(), core.sys.tr.selector), (USER, TASK_SELECTOR), "the fault is the new task's");
    assert_eq!(core.rflags() & rflags::NT, rflags::NT);
    assert_eq!(descriptor_at(&core, TSS_SELECTOR) >> 41 & 1, 1);

    let mut core = legacy(0);
    set_descriptor(&core, TASK_SELECTOR, descriptor_at(&core, TASK_SELECTOR) - 1);
    let got = fault(once(&mut core, &[0xea, 0, 0, 0, 0, TASK_SELECTOR as u8, 0]));
    assert_eq!((got, core.rip()), (Some((10, Some(0x88))), CODE), "a short TSS");
}

#[test]
fn syscall_and_sysret() {
    let mut core = long(3);
    core.sys.star = 0x0018_0008_u64 << 32;
    core.sys.lstar = 0xffff_ffff_8200_0000;
    core.sys.sfmask = rflags::IF | rflags::TF | rflags::DF;
    core.set_rflags(rflags::FIXED | rflags::IF | rflags::CF | rflags::DF);
    once(&mut core, &[0x0f, 0x05]).expect("syscall");
    assert_eq!((core.rip(), core.cpl()), (0xffff_ffff_8200_0000, 0));
    assert_eq!((core.gpr(1), core.gpr(11)), (USER + 2, 0x603));
    assert_eq!(core.rflags(), rflags::FIXED | rflags::CF);
    assert_eq!((core.sys.segments[seg::CS].selector, core.sys.segments[seg::SS].selector), (8, 0x10));
    assert!(core.is_64bit());
    once(&mut core, &[0x48, 0x0f, 0x07]).expect("sysretq");
    assert_eq!((core.rip(), core.cpl(), core.rflags()), (USER + 2, 3, 0x603));
    assert_eq!(core.sys.segments[seg::CS].selector, USER_CODE64);
    assert_eq!(core.sys.segments[seg::SS].selector, USER_DATA);
    assert_eq!(fault(once(&mut core, &[0x48, 0x0f, 0x07])), gp(0), "sysret in user mode");

    let mut core = long(0);
    core.sys.star = 0x0018_0008_u64 << 32;
    core.set_gpr(1, 0x1_0000_1234);
    core.set_gpr(11, u64::MAX);
    once(&mut core, &[0x0f, 0x07]).expect("sysretl");
    assert_eq!((core.rip(), core.is_64bit(), core.rflags()), (0x1234, false, 0x3c_7fd7));
    let mut core = long(3);
    core.sys.efer &= !efer::SCE;
    assert_eq!(fault(once(&mut core, &[0x0f, 0x05])), UD);
    assert_eq!(fault(once(&mut real(), &[0x0f, 0x05])), UD);
}

/// A processor of another vendor.
fn vendor(mut core: Box<Core>, name: &str) -> Box<Core> {
    let offer = Offer { avx512: false, tsc_hz: 1_000_000_000, ..Offer::default() };
    core.model = CpuModel::host(&format!("host,vendor={name}"), &offer).expect("model").into();
    core
}

#[test]
fn vendors_differ() {
    let compat = |name| {
        let mut core = vendor(long(3), name);
        core.sys.cstar = 0x1_0000;
        core.sys.star = 0x0018_0008_u64 << 32;
        enter(&mut core, USER_CODE32, USER_DATA, USER, USER_STACK);
        core
    };
    assert_eq!(fault(once(&mut compat("GenuineIntel"), &[0x0f, 0x05])), UD);
    let mut core = compat("AuthenticAMD");
    once(&mut core, &[0x0f, 0x05]).expect("syscall");
    assert_eq!((core.rip(), core.gpr(1), core.cpl()), (0x1_0000, USER + 2, 0));

    let mut core = vendor(long(0), "GenuineIntel");
    core.set_gpr(1, 1 << 47);
    assert_eq!(fault(once(&mut core, &[0x48, 0x0f, 0x07])), gp(0));
    let mut core = compat("AuthenticAMD");
    core.sys.sysenter_cs = 8;
    assert_eq!(fault(once(&mut core, &[0x0f, 0x34])), UD);
}

#[test]
fn sysenter_and_sysexit() {
    let mut core = vendor(long(3), "GenuineIntel");
    assert_eq!(fault(once(&mut core, &[0x0f, 0x34])), gp(0), "no selector");
    core.sys.sysenter_cs = 8;
    core.sys.sysenter_eip = 0xffff_ffff_8300_0000;
    core.sys.sysenter_esp = RING0_STACK;
    core.set_rflags(rflags::FIXED | rflags::IF | rflags::CF);
    once(&mut core, &[0x0f, 0x34]).expect("sysenter");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (0, 0xffff_ffff_8300_0000, RING0_STACK));
    assert_eq!(core.rflags(), rflags::FIXED | rflags::CF);
    core.set_gpr(1, USER_STACK);
    core.set_gpr(2, USER);
    once(&mut core, &[0x48, 0x0f, 0x35]).expect("sysexitq");
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (3, USER, USER_STACK));
    assert_eq!((core.sys.segments[seg::CS].selector, core.sys.segments[seg::SS].selector), (0x2b, 0x33));
    assert_eq!(fault(once(&mut core, &[0x0f, 0x35])), gp(0));
    let mut core = legacy(3);
    core.sys.sysenter_cs = u64::from(KERNEL_CODE32);
    core.sys.sysenter_eip = HANDLER;
    once(&mut core, &[0x0f, 0x34]).expect("sysenter");
    assert_eq!((core.cpl(), core.rip(), core.is_64bit()), (0, HANDLER, false));
}
