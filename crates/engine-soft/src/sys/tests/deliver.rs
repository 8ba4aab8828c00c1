use wardian_cpu::bits::{rflags, vector};

use super::*;
use crate::sys::deliver::{Class, TripleFault, class, combine};
use crate::sys::{Event, deliver};

fn exception(vector: u8, error: Option<u32>, payload: u64) -> Exception {
    Exception { vector, error, payload }
}

/// The quadwords of a frame from `top` down to `at`, first pushed first.
fn frame64(core: &Core, count: u64) -> Vec<u64> {
    (0..count).rev().map(|n| u64_at(core, core.gpr(4) + n * 8)).collect()
}

fn frame32(core: &Core, count: u64) -> Vec<u32> {
    (0..count).rev().map(|n| u32_at(core, core.gpr(4) + n * 4)).collect()
}

#[test]
fn page_fault_from_user_mode() {
    let mut core = long(3);
    set_gate(&core, 14, KERNEL_CODE64, 0xffff_ffff_8100_0000, 0x8e, 0);
    let flags = rflags::IF | rflags::FIXED | rflags::TF | rflags::ZF | rflags::NT;
    core.set_rflags(flags);
    let event = Event::Exception(exception(vector::PF, Some(6), 0x1234_5678));
    assert_eq!(deliver(&mut core, event), Ok(()));
    assert_eq!(core.sys.cr2, 0x1234_5678);
    assert_eq!((core.cpl(), core.rip()), (0, 0xffff_ffff_8100_0000));
    assert_eq!(core.gpr(4), RING0_STACK - 48);
    assert_eq!(
        frame64(&core, 6),
        [u64::from(USER_DATA), USER_STACK, flags | rflags::RF, u64::from(USER_CODE64), USER, 6]
    );
    assert_eq!(core.rflags(), rflags::FIXED | rflags::ZF);
    let ss = core.sys.segments[seg::SS];
    assert!(ss.unusable() && ss.selector == 0);
    assert_eq!(core.sys.segments[seg::CS].selector, KERNEL_CODE64);
}

#[test]
fn interrupt_in_the_kernel_aligns_and_keeps_ss() {
    let mut core = long(0);
    set_gate(&core, 0x40, KERNEL_CODE64, HANDLER, 0x8f, 0); // trap gate
    core.set_rflags(rflags::IF | rflags::FIXED);
    core.set_gpr(4, STACK - 4);
    core.sys.interrupt_shadow = true;
    assert_eq!(deliver(&mut core, Event::External(0x40)), Ok(()));
    assert_eq!(core.gpr(4), STACK - 16 - 40);
    assert_eq!(frame64(&core, 5), [u64::from(KERNEL_DATA), STACK - 4, 0x202, u64::from(KERNEL_CODE64), CODE]);
    assert_eq!(core.rflags(), 0x202, "a trap gate leaves IF");
    assert_eq!(core.sys.segments[seg::SS].selector, KERNEL_DATA);
    assert!(!core.sys.interrupt_shadow);
}

#[test]
fn interrupt_stack_table() {
    for cpl in [0, 3] {
        let mut core = long(cpl);
        set_gate(&core, 2, KERNEL_CODE64, HANDLER, 0x8e, 1);
        assert_eq!(deliver(&mut core, Event::Nmi), Ok(()));
        assert_eq!(core.gpr(4), IST1 - 40);
        assert!(core.sys.nmi_blocked);
        assert_eq!(core.sys.segments[seg::SS].selector, if cpl == 0 { KERNEL_DATA } else { 0 });
    }
}

#[test]
fn gates_that_cannot_be_used() {
    // (what, level, vector of INT n, gate rights, target, fault)
    let rows = [
        ("inner gate", 3, 0x30, 0x8e, KERNEL_CODE64, gp(0x30 * 8 + 2)),
        ("absent gate", 3, 0x31, 0x6e, KERNEL_CODE64, Some((11, Some(0x31 * 8 + 2)))),
        ("not a gate", 0, 0x32, 0x89, KERNEL_CODE64, gp(0x32 * 8 + 2)),
        ("beyond the IDT", 0, 0xff, 0x8e, KERNEL_CODE64, None),
        ("null target", 0, 0x33, 0x8e, 0, gp(0)),
        ("data target", 0, 0x34, 0x8e, KERNEL_DATA, gp(0x10)),
        ("32-bit target", 0, 0x35, 0x8e, KERNEL_CODE32, gp(0x40)),
        ("outer target", 0, 0x36, 0x8e, USER_CODE64, gp(0x28)),
        ("fine", 3, 0x37, 0xee, KERNEL_CODE64, None),
    ];
    for (what, cpl, number, rights, target, want) in rows {
        let mut core = long(cpl);
        set_gate(&core, number, target, HANDLER, rights, 0);
        let mut want = want;
        if what == "beyond the IDT" {
            core.sys.idtr.limit = 0xffe;
            want = gp(0xff * 8 + 2);
        }
        let before = (core.rip(), core.gpr(4));
        assert_eq!(fault(once(&mut core, &[0xcd, number as u8])), want, "{what}");
        if want.is_some() {
            assert_eq!((core.rip(), core.gpr(4)), before, "{what}");
        } else {
            assert_eq!(frame64(&core, 5)[4], before.0 + 2, "{what}: returns behind INT");
        }
    }
}

#[test]
fn external_events_set_ext() {
    let mut core = long(0);
    set_gate(&core, 13, KERNEL_CODE64, HANDLER, 0x8e, 0);
    // No gate for vector 40h: #GP(40h * 8 + IDT + EXT).
    assert_eq!(deliver(&mut core, Event::External(0x40)), Ok(()));
    assert_eq!(frame64(&core, 6)[5], 0x40 * 8 + 3);
}

#[test]
fn double_faults_by_class() {
    let contributory = [vector::DE, vector::TS, vector::NP, vector::SS, vector::GP];
    let benign =
        [vector::DB, vector::NMI, vector::BP, vector::UD, vector::NM, vector::MF, vector::AC, vector::XM];
    let double = Some(exception(vector::DF, Some(0), 0));
    for second in contributory {
        let e = exception(second, Some(8), 0);
        assert_eq!(combine(Class::Benign, e), Some(e));
        for first in contributory {
            assert_eq!(combine(class(first), e), double);
        }
        assert_eq!(combine(class(vector::PF), e), double);
        assert_eq!(combine(class(vector::DF), e), None);
    }
    let pf = exception(vector::PF, Some(2), 0x1000);
    assert_eq!(combine(Class::Benign, pf), Some(pf));
    assert_eq!(combine(class(vector::GP), pf), Some(pf));
    assert_eq!(combine(class(vector::PF), pf), double);
    assert_eq!(combine(class(vector::DF), pf), None);
    for second in benign {
        let e = exception(second, None, 0);
        for first in [vector::DE, vector::PF, vector::DF, vector::UD] {
            assert_eq!(combine(class(first), e), Some(e));
        }
    }
}

#[test]
fn a_page_fault_on_the_stack_of_a_page_fault_is_a_double_fault() {
    let mut core = long(0);
    set_gate(&core, 14, KERNEL_CODE64, HANDLER, 0x8e, 0);
    set_gate(&core, 8, KERNEL_CODE64, HANDLER + 8, 0x8e, 1);
    core.set_gpr(4, HOLE + 0x100);
    let event = Event::Exception(exception(vector::PF, Some(0), 0x77));
    assert_eq!(deliver(&mut core, event), Ok(()));
    assert_eq!(core.rip(), HANDLER + 8);
    assert_eq!(core.sys.cr2, HOLE + 0x100 - 48, "CR2 is the second fault's");
    assert_eq!(frame64(&core, 6)[5], 0);
    assert_eq!(frame64(&core, 6)[1], HOLE + 0x100);
}

#[test]
fn an_external_interrupt_that_page_faults_is_followed_by_the_page_fault() {
    let mut core = long(3);
    set_gate(&core, 14, KERNEL_CODE64, HANDLER, 0x8e, 1);
    set_gate(&core, 0x50, KERNEL_CODE64, HANDLER + 8, 0x8e, 0);
    poke(&core, TSS + 4, &(HOLE + 0x800).to_le_bytes());
    assert_eq!(deliver(&mut core, Event::External(0x50)), Ok(()));
    assert_eq!((core.rip(), core.sys.cr2), (HANDLER, HOLE + 0x800 - 40));
    assert_eq!(frame64(&core, 6)[5], 2, "a supervisor write");
    assert_eq!(frame64(&core, 6)[3], u64::from(USER_CODE64), "the interrupted code");
}

#[test]
fn no_handler_at_all_is_a_triple_fault() {
    let mut core = long(0);
    core.sys.idtr.limit = 0;
    assert_eq!(deliver(&mut core, Event::Exception(exception(vector::UD, None, 0))), Err(TripleFault));
    let mut core = real();
    core.sys.idtr.limit = 0;
    assert_eq!(deliver(&mut core, Event::External(8)), Err(TripleFault));
}

#[test]
fn debug_exceptions_leave_their_reason_and_clear_gd() {
    let mut core = long(0);
    set_gate(&core, 1, KERNEL_CODE64, HANDLER, 0x8e, 0);
    core.sys.dr6 = 0xffff_0ff3;
    core.sys.dr7 |= 1 << 13;
    core.set_rflags(rflags::FIXED | rflags::TF);
    assert_eq!(deliver(&mut core, Event::Exception(exception(vector::DB, None, 1 << 14))), Ok(()));
    assert_eq!(core.sys.dr6, 0xffff_4ff0);
    assert_eq!(core.sys.dr7 & (1 << 13), 0);
    assert_eq!(frame64(&core, 5)[2], rflags::FIXED | rflags::TF, "no RF for a trap");
    // INT1 leaves DR6 alone and needs no gate privilege.
    let mut core = long(3);
    set_gate(&core, 1, KERNEL_CODE64, HANDLER, 0x8e, 0);
    once(&mut core, &[0xf1]).expect("int1");
    assert_eq!((core.rip(), core.sys.dr6), (HANDLER, 0xffff_0ff0));
    assert_eq!(frame64(&core, 5)[4], USER + 1);
}

#[test]
fn breakpoints_and_overflow() {
    let mut core = legacy(3);
    set_gate(&core, 3, KERNEL_CODE32, HANDLER, 0xee, 0);
    set_gate(&core, 4, KERNEL_CODE32, HANDLER, 0xee, 0);
    once(&mut core, &[0xce]).expect("into without OF");
    assert_eq!(core.rip(), USER + 1);
    core.set_rflags(rflags::FIXED | rflags::OF);
    once(&mut core, &[0xce]).expect("into");
    assert_eq!((core.cpl(), core.rip()), (0, HANDLER));
    assert_eq!(frame32(&core, 5)[4], USER as u32 + 2);
    let mut core = legacy(3);
    set_gate(&core, 3, KERNEL_CODE32, HANDLER, 0x8e, 0);
    assert_eq!(fault(once(&mut core, &[0xcc])), gp(3 * 8 + 2));
}

#[test]
fn protected_mode_frames() {
    // To an inner level, with an error code, by a 32-bit gate.
    let mut core = legacy(3);
    set_gate(&core, 13, KERNEL_CODE32, HANDLER, 0x8e, 0);
    assert_eq!(deliver(&mut core, Event::Exception(exception(vector::GP, Some(0x18), 0))), Ok(()));
    assert_eq!(core.gpr(4), RING0_STACK - 24);
    let flags = (rflags::FIXED | rflags::RF) as u32;
    assert_eq!(
        frame32(&core, 6),
        [u32::from(USER_DATA), USER_STACK as u32, flags, u32::from(USER_CODE32), USER as u32, 0x18]
    );
    assert_eq!(core.sys.segments[seg::SS].selector, KERNEL_DATA);
    // On the same level by a 16-bit gate.
    let mut core = legacy(0);
    set_gate(&core, 0x20, KERNEL_CODE32, HANDLER, 0x86, 0);
    assert_eq!(deliver(&mut core, Event::External(0x20)), Ok(()));
    assert_eq!(core.gpr(4), STACK - 6);
    assert_eq!(core.rip(), HANDLER & 0xffff);
    // A conforming handler runs on the caller's level.
    let mut core = legacy(3);
    set_gate(&core, 0x21, CONFORMING, HANDLER, 0xee, 0);
    once(&mut core, &[0xcd, 0x21]).expect("int");
    assert_eq!((core.cpl(), core.gpr(4)), (3, USER_STACK - 12));
    assert_eq!(core.sys.segments[seg::CS].selector, CONFORMING | 3);
}

#[test]
fn broken_inner_stacks() {
    // (what, SS in the TSS, TSS limit, fault)
    let ts = |code| Some((10, Some(code)));
    let rows = [
        ("short TSS", KERNEL_DATA, 8, ts(0x30)),
        ("null", 0, 0x67, ts(0)),
        ("wrong level", USER_DATA, 0x67, ts(0x20)),
        ("code", KERNEL_CODE32, 0x67, ts(0x40)),
        ("beyond", BEYOND, 0x67, ts(0xa8)),
        ("absent", 0x60, 0x67, ts(0x60)),
    ];
    for (what, ss, limit, want) in rows {
        let mut core = legacy(3);
        set_gate(&core, 0x80, KERNEL_CODE32, HANDLER, 0xee, 0);
        poke(&core, TSS + 8, &u32::from(ss).to_le_bytes());
        core.sys.tr.limit = limit;
        assert_eq!(fault(once(&mut core, &[0xcd, 0x80])), want, "{what}");
        assert_eq!((core.cpl(), core.rip()), (3, USER), "{what}");
    }
    let mut core = legacy(3);
    set_gate(&core, 0x80, KERNEL_CODE32, HANDLER, 0xee, 0);
    set_descriptor(&core, KERNEL_DATA, 0x00cf_1300_0000_ffff);
    assert_eq!(fault(once(&mut core, &[0xcd, 0x80])), Some((12, Some(0x10))), "absent stack");
}

#[test]
fn real_mode_vectors() {
    let mut core = real();
    poke(&core, 0x21 * 4, &[0x34, 0x12, 0x00, 0x20]);
    core.set_rflags(rflags::FIXED | rflags::IF | rflags::TF | rflags::CF);
    once(&mut core, &[0xcd, 0x21]).expect("int 21h");
    assert_eq!((core.rip(), core.c().rip), (0x1234, 0x2_1234));
    assert_eq!(core.gpr(4), STACK - 6);
    assert_eq!(u64_at(&core, STACK - 6) & 0xffff_ffff_ffff, (0x303 << 32) | (CODE + 2));
    assert_eq!(core.rflags(), rflags::FIXED | rflags::CF);
    // Exceptions push no error code; the stack wraps within its segment.
    let mut core = real();
    poke(&core, 13 * 4, &[0x00, 0x01, 0x00, 0x00]);
    core.set_gpr(4, 0xabcd_0002);
    assert_eq!(deliver(&mut core, Event::Exception(exception(vector::GP, Some(0), 0))), Ok(()));
    assert_eq!((core.gpr(4), core.rip()), (0xabcd_fffc, 0x100));
    assert_eq!(peek(&core, 0xfffc, 2), (CODE as u16).to_le_bytes());
    assert_eq!(peek(&core, 0, 2), [0x02, 0x00], "the low half of the flags, RF does not fit");
}

#[test]
fn virtual_8086_frames_and_back() {
    let mut core = legacy(0);
    set_gate(&core, 0x10, KERNEL_CODE32, HANDLER, 0x8e, 0);
    // IRETD to V86 mode: EIP CS EFLAGS ESP SS ES DS FS GS.
    let flags = (rflags::FIXED | rflags::VM | rflags::IF) as u32;
    let frame = [0x100u32, 0x1000, flags, 0xfffe, 0x2000, 1, 2, 3, 4];
    for (n, value) in frame.into_iter().enumerate() {
        poke(&core, STACK + n as u64 * 4, &value.to_le_bytes());
    }
    once(&mut core, &[0xcf]).expect("iretd");
    assert!(core.v86());
    assert_eq!((core.cpl(), core.c().rip, core.gpr(4)), (3, 0x1_0100, 0xfffe));
    assert_eq!(core.sys.segments[seg::GS].base, 0x40);
    // INT n and CLI need IOPL 3.
    assert_eq!(fault(once(&mut core, &[0xcd, 0x10])), gp(0));
    assert_eq!(fault(once(&mut core, &[0xfa])), gp(0));
    // An interrupt leaves V86 mode.
    assert_eq!(deliver(&mut core, Event::External(0x10)), Ok(()));
    assert_eq!((core.cpl(), core.v86(), core.rip()), (0, false, HANDLER));
    assert_eq!(frame32(&core, 9), [4, 3, 2, 1, 0x2000, 0xfffe, flags, 0x1000, 0x100]);
    assert!(core.sys.segments[seg::DS].unusable());
    once(&mut core, &[0xcf]).expect("iretd");
    assert!(core.v86());
    assert_eq!(core.c().rip, 0x1_0100);
}

#[test]
fn task_gates() {
    let mut core = legacy(3);
    set_gate(&core, 8, TASK_SELECTOR, 0, 0x85, 0);
    poke(&core, TASK + 0x20, &(HANDLER as u32).to_le_bytes());
    poke(&core, TASK + 0x24, &2u32.to_le_bytes());
    poke(&core, TASK + 0x38, &(STACK as u32).to_le_bytes());
    for (at, selector) in [(0x4c, KERNEL_CODE32), (0x50, KERNEL_DATA), (0x54, KERNEL_DATA)] {
        poke(&core, TASK + at, &u32::from(selector).to_le_bytes());
    }
    core.set_gpr(0, 0x1234);
    assert_eq!(deliver(&mut core, Event::Exception(exception(vector::DF, Some(0), 0))), Ok(()));
    assert_eq!((core.cpl(), core.rip(), core.gpr(4)), (0, HANDLER, STACK - 4));
    assert_eq!(core.sys.tr.selector, TASK_SELECTOR);
    assert_eq!(core.rflags() & rflags::NT, rflags::NT);
    assert_eq!(u32_at(&core, TASK) & 0xffff, u32::from(TSS_SELECTOR), "link");
    assert_eq!(u32_at(&core, TSS + 0x28), 0x1234, "EAX saved");
    assert_eq!(u32_at(&core, TSS + 0x20), USER as u32, "EIP saved");
    // IRET goes back.
    core.set_gpr(4, STACK);
    once(&mut core, &[0xcf]).expect("iretd");
    assert_eq!((core.cpl(), core.rip(), core.gpr(0), core.gpr(4)), (3, USER, 0x1234, USER_STACK));
    assert_eq!(core.sys.tr.selector, TSS_SELECTOR);
    assert_eq!(descriptor_at(&core, TASK_SELECTOR) >> 41 & 1, 0, "not busy any more");
    assert_eq!(core.sys.cr0 & cr0::TS, cr0::TS);
}
