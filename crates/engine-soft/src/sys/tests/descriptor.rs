use wardian_cpu::bits::{cr4, rflags};

use super::*;
use crate::sys::descriptor::load;

/// (what, level, segment register, selector, expected fault).
type Row = (&'static str, u8, usize, u16, Option<(u8, Option<u32>)>);

#[test]
fn data_segment_loads() {
    let np = |code| Some((11, Some(code)));
    let rows: &[Row] = &[
        ("user data", 3, seg::DS, USER_DATA, None),
        ("kernel data from user", 3, seg::DS, KERNEL_DATA, gp(0x10)),
        ("kernel data with RPL 3", 0, seg::DS, KERNEL_DATA | 3, gp(0x10)),
        ("user data from kernel", 0, seg::ES, USER_DATA, None),
        ("read-only data", 3, seg::FS, READ_ONLY, None),
        ("execute-only code", 3, seg::GS, EXECUTE_ONLY, gp(0x58)),
        ("readable code", 3, seg::GS, USER_CODE32, None),
        ("conforming code of an inner level", 3, seg::DS, CONFORMING | 3, None),
        ("absent", 3, seg::DS, ABSENT, np(0x60)),
        ("system descriptor", 0, seg::DS, TSS_SELECTOR, gp(0x30)),
        ("beyond the table", 0, seg::DS, BEYOND, gp(0xa8)),
        ("local without LDT", 0, seg::DS, 0x0c, gp(0x0c)),
        ("null", 3, seg::DS, 0, None),
        ("null with RPL", 3, seg::DS, 3, None),
        ("SS read-only", 3, seg::SS, READ_ONLY, gp(0x50)),
        ("SS of another level", 0, seg::SS, USER_DATA, gp(0x20)),
        ("SS with wrong RPL", 0, seg::SS, KERNEL_DATA | 1, gp(0x10)),
        ("SS absent", 3, seg::SS, ABSENT, Some((12, Some(0x60)))),
        ("SS code", 3, seg::SS, USER_CODE32, gp(0x18)),
        ("SS null at level 3", 3, seg::SS, 3, gp(0)),
    ];
    for (what, cpl, index, selector, want) in rows {
        for mut core in [long(*cpl), legacy(*cpl)] {
            let before = core.sys.segments[*index];
            let got = fault(load(&mut core, *index, *selector));
            assert_eq!(got, *want, "{what}, long {}", core.long_mode());
            let after = core.sys.segments[*index];
            match want {
                None => assert_eq!(after.selector, *selector, "{what}"),
                Some(_) => assert_eq!(after, before, "{what}"),
            }
        }
    }
}

#[test]
fn null_stack_segment_only_in_64_bit_kernel() {
    let mut core = long(0);
    assert_eq!(fault(load(&mut core, seg::SS, 0)), None);
    assert!(core.sys.segments[seg::SS].unusable());
    assert_eq!(fault(load(&mut core, seg::SS, 1)), gp(0));
    assert_eq!(fault(load(&mut legacy(0), seg::SS, 0)), gp(0));
}

#[test]
fn loading_marks_accessed() {
    let mut core = legacy(0);
    once(&mut core, &[0x8e, 0xd8]).expect("mov ds, ax: null");
    core.set_gpr(0, u64::from(UNTOUCHED));
    once(&mut core, &[0x8e, 0xd8]).expect("mov ds, ax");
    assert_eq!(descriptor_at(&core, UNTOUCHED) >> 40 & 1, 1);
    assert_eq!(core.sys.segments[seg::DS].limit, u32::MAX);
    assert_eq!(core.sys.segments[seg::DS].rights, 0xc0f3);
}

#[test]
fn moves_to_ss_shadow_interrupts_once() {
    let mut core = legacy(0);
    core.set_gpr(0, u64::from(KERNEL_DATA));
    once(&mut core, &[0x8e, 0xd0]).expect("mov ss, ax");
    assert!(core.sys.interrupt_shadow);
    assert_eq!(core.rip(), CODE + 2);
    once(&mut core, &[0x8c, 0xd1]).expect("mov ecx, ss");
    assert!(!core.sys.interrupt_shadow);
    assert_eq!(core.gpr(1), u64::from(KERNEL_DATA));
    // MOV CS is undefined.
    let insn = iced_x86::Decoder::new(32, &[0x8e, 0xc8], 0).decode();
    assert_eq!(fault(crate::sys::interpret(&mut core, &insn)), UD);
}

#[test]
fn push_and_pop() {
    let mut core = legacy(0);
    once(&mut core, &[0x1e]).expect("push ds");
    assert_eq!(core.gpr(4), STACK - 4);
    assert_eq!(u32_at(&core, STACK - 4), u32::from(KERNEL_DATA));
    poke(&core, STACK - 4, &u32::from(USER_DATA).to_le_bytes());
    once(&mut core, &[0x0f, 0xa1]).expect("pop fs");
    assert_eq!((core.gpr(4), core.sys.segments[seg::FS].selector), (STACK, USER_DATA));
    poke(&core, STACK, &u32::from(BEYOND).to_le_bytes());
    assert_eq!(fault(once(&mut core, &[0x07])), gp(0xa8), "pop es");
    assert_eq!(core.gpr(4), STACK, "nothing is committed");
}

#[test]
fn far_pointer_loads() {
    let mut core = legacy(0);
    core.set_gpr(3, 0x7000);
    poke(&core, 0x7000, &[0x78, 0x56, 0x34, 0x12, KERNEL_DATA as u8, 0]);
    once(&mut core, &[0x0f, 0xb2, 0x03]).expect("lss eax, [ebx]");
    assert_eq!(core.gpr(0), 0x1234_5678);
    poke(&core, 0x7004, &BEYOND.to_le_bytes());
    core.set_gpr(0, 0);
    assert_eq!(fault(once(&mut core, &[0xc5, 0x03])), gp(0xa8), "lds eax, [ebx]");
    assert_eq!(core.gpr(0), 0);
}

#[test]
fn access_rights_limits_and_verification() {
    // Selector, at level 3: LAR, LSL, VERR, VERW.
    type Rights = (u16, Option<u64>, Option<u64>, bool, bool);
    let rows: &[Rights] = &[
        (USER_DATA, Some(0xcf_f300), Some(0xffff_ffff), true, true),
        (READ_ONLY, Some(0xcf_f100), Some(0xffff_ffff), true, false),
        (EXECUTE_ONLY, Some(0xcf_f900), Some(0xffff_ffff), false, false),
        (KERNEL_DATA, None, None, false, false),
        (CONFORMING | 3, Some(0xcf_9f00), Some(0xffff_ffff), true, false),
        (ABSENT, Some(0xcf_7300), Some(0xffff_ffff), true, true),
        (TSS_SELECTOR, None, None, false, false),
        (BEYOND, None, None, false, false),
        (0, None, None, false, false),
    ];
    for (selector, lar, lsl, verr, verw) in rows {
        let mut core = long(3);
        let mut run = |bytes: &[u8]| {
            core.set_gpr(0, u64::from(*selector));
            core.set_gpr(1, 0x55);
            let flags = core.rflags();
            core.set_rflags(flags ^ rflags::ZF ^ rflags::CF);
            let carry = core.rflags() & rflags::CF;
            once(&mut core, bytes).expect("no fault");
            assert_eq!(core.rflags() & rflags::CF, carry);
            (core.rflags() & rflags::ZF != 0, core.gpr(1))
        };
        let (zf, value) = run(&[0x0f, 0x02, 0xc8]);
        assert_eq!((zf, value), (lar.is_some(), lar.unwrap_or(0x55)), "LAR {selector:#x}");
        let (zf, value) = run(&[0x0f, 0x03, 0xc8]);
        assert_eq!((zf, value), (lsl.is_some(), lsl.unwrap_or(0x55)), "LSL {selector:#x}");
        assert_eq!(run(&[0x0f, 0x00, 0xe0]).0, *verr, "VERR {selector:#x}");
        assert_eq!(run(&[0x0f, 0x00, 0xe8]).0, *verw, "VERW {selector:#x}");
    }
    // A level-0 look at system descriptors: the 64-bit TSS has a limit, a call gate has not.
    let mut core = long(0);
    set_descriptor(&core, GATE, gate(KERNEL_CODE64, HANDLER, 0x8c));
    for (selector, lar, lsl) in [(TSS_SELECTOR, true, true), (GATE, true, false), (LDT_SELECTOR, true, true)]
    {
        core.set_gpr(0, u64::from(selector));
        once(&mut core, &[0x0f, 0x02, 0xc8]).expect("lar");
        assert_eq!(core.rflags() & rflags::ZF != 0, lar, "LAR {selector:#x}");
        once(&mut core, &[0x0f, 0x03, 0xc8]).expect("lsl");
        assert_eq!(core.rflags() & rflags::ZF != 0, lsl, "LSL {selector:#x}");
    }
    assert_eq!(fault(once(&mut real(), &[0x0f, 0x02, 0xc8])), UD);
}

#[test]
fn task_register_and_ldt() {
    let mut core = long(0);
    set_descriptor(&core, TSS_SELECTOR, descriptor_at(&core, TSS_SELECTOR) & !(2 << 40));
    poke(&core, GDT + 0x38, &0xffff_8000u64.to_le_bytes());
    core.set_gpr(0, u64::from(TSS_SELECTOR));
    once(&mut core, &[0x0f, 0x00, 0xd8]).expect("ltr ax");
    assert_eq!(core.sys.tr.base, 0xffff_8000_0000_0000 | TSS);
    assert_eq!(core.sys.tr.kind(), 11);
    assert_eq!(descriptor_at(&core, TSS_SELECTOR) >> 41 & 1, 1, "busy in memory");
    assert_eq!(fault(once(&mut core, &[0x0f, 0x00, 0xd8])), gp(0x30), "busy already");
    poke(&core, GDT + 0x70, &0u64.to_le_bytes());
    core.set_gpr(0, u64::from(LDT_SELECTOR));
    once(&mut core, &[0x0f, 0x00, 0xd0]).expect("lldt ax");
    assert_eq!((core.sys.ldtr.base, core.sys.ldtr.limit), (LDT, 0xff));
    poke(&core, LDT + 8, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    assert_eq!(fault(load(&mut core, seg::DS, 0x0c)), None);
    core.set_gpr(0, 0);
    once(&mut core, &[0x0f, 0x00, 0xd0]).expect("lldt 0");
    assert_eq!(fault(load(&mut core, seg::DS, 0x0c)), gp(0x0c));
    core.set_gpr(0, u64::from(KERNEL_DATA));
    assert_eq!(fault(once(&mut core, &[0x0f, 0x00, 0xd0])), gp(0x10));
    assert_eq!(fault(once(&mut long(3), &[0x0f, 0x00, 0xd0])), gp(0));
    assert_eq!(fault(once(&mut real(), &[0x0f, 0x00, 0xd0])), UD);
}

#[test]
fn table_registers() {
    let mut core = long(0);
    core.set_gpr(3, 0x7000);
    once(&mut core, &[0x0f, 0x01, 0x03]).expect("sgdt [rbx]");
    assert_eq!(peek(&core, 0x7000, 10), [&(BEYOND - 1).to_le_bytes()[..], &GDT.to_le_bytes()].concat());
    poke(&core, 0x7000, &[0xff, 0x0f]);
    poke(&core, 0x7002, &0xffff_ffff_8123_0000u64.to_le_bytes());
    once(&mut core, &[0x0f, 0x01, 0x1b]).expect("lidt [rbx]");
    assert_eq!((core.sys.idtr.base, core.sys.idtr.limit), (0xffff_ffff_8123_0000, 0xfff));
    poke(&core, 0x7002, &(1u64 << 47).to_le_bytes());
    assert_eq!(fault(once(&mut core, &[0x0f, 0x01, 0x13])), gp(0), "not canonical");

    let mut core = long(3);
    core.set_gpr(3, USER + 0x1000);
    assert_eq!(fault(once(&mut core, &[0x0f, 0x01, 0x0b])), None, "sidt in user mode");
    assert_eq!(fault(once(&mut core, &[0x0f, 0x01, 0x13])), gp(0), "lgdt in user mode");
    core.sys.cr4 |= cr4::UMIP;
    for bytes in [&[0x0f, 0x01, 0x0b][..], &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0xc8], &[0x0f, 0x01, 0xe0]] {
        assert_eq!(fault(once(&mut core, bytes)), gp(0), "UMIP {bytes:x?}");
    }

    // 16-bit operand size loads 24 bits of base.
    let mut core = real();
    core.set_gpr(3, 0x7000);
    poke(&core, 0x7000, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x12]);
    once(&mut core, &[0x0f, 0x01, 0x17]).expect("lgdt [bx]");
    assert_eq!((core.sys.gdtr.base, core.sys.gdtr.limit), (0x34_5678, 0x1234));
    once(&mut core, &[0x66, 0x0f, 0x01, 0x17]).expect("lgdt dword [bx]");
    assert_eq!(core.sys.gdtr.base, 0x1234_5678);
}

#[test]
fn adjusting_rpl() {
    let mut core = legacy(0);
    core.set_gpr(0, 0x11);
    core.set_gpr(1, 0x23);
    once(&mut core, &[0x63, 0xc8]).expect("arpl ax, cx");
    assert_eq!((core.gpr(0), core.rflags() & rflags::ZF), (0x13, rflags::ZF));
    core.set_gpr(1, 0x22);
    once(&mut core, &[0x63, 0xc8]).expect("arpl ax, cx");
    assert_eq!((core.gpr(0), core.rflags() & rflags::ZF), (0x13, 0));
}

#[test]
fn bases_of_fs_and_gs() {
    let mut core = long(0);
    core.ctx.get_mut().kernel_gs_base = 0xffff_8000_1234_5000;
    once(&mut core, &[0x0f, 0x01, 0xf8]).expect("swapgs");
    assert_eq!(core.c().seg_base[seg::GS], 0xffff_8000_1234_5000);
    assert_eq!(core.c().kernel_gs_base, 0);
    assert_eq!(fault(once(&mut long(3), &[0x0f, 0x01, 0xf8])), gp(0));
    assert_eq!(fault(once(&mut legacy(0), &[0x0f, 0x01, 0xf8])), UD);
    let mut core = long(3);
    core.set_gpr(0, 0x7fff_ffff_f000);
    once(&mut core, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]).expect("wrfsbase rax");
    once(&mut core, &[0xf3, 0x48, 0x0f, 0xae, 0xc1]).expect("rdfsbase rcx");
    assert_eq!(core.gpr(1), 0x7fff_ffff_f000);
    core.set_gpr(0, 1 << 47);
    assert_eq!(fault(once(&mut core, &[0xf3, 0x48, 0x0f, 0xae, 0xd8])), gp(0), "wrgsbase rax");
    core.sys.cr4 &= !cr4::FSGSBASE;
    assert_eq!(fault(once(&mut core, &[0xf3, 0x48, 0x0f, 0xae, 0xc1])), UD);
}
