use wardian_cpu::Exit;
use wardian_cpu::bits::rflags;

use crate::core::Core;
use crate::sys::legacy::harness::{
    CODE, complete, core16, core64, exception, once, page_fault, peek, poke, protect, run,
};
use crate::sys::legacy::operand::{RAX, RCX, RDI, RDX, RSI};
use crate::trap::Trap;

const IN_AL_DX: &[u8] = &[0xec];
const TSS: u64 = 0x6_0000;

/// 64-bit user code with a TSS of which `limit` bytes exist and whose bitmap is at `map`.
fn user(map: u16, limit: u32) -> Box<Core> {
    let mut core = core64();
    core.sys.tr = wardian_cpu::Segment { selector: 8, base: TSS, limit, rights: 0x8b };
    poke(&core, TSS, &[0xff; 0x3000]);
    poke(&core, TSS + 102, &map.to_le_bytes());
    core
}

#[test]
fn the_bitmap_says_who_may() {
    let allowed = |core: &mut Core, port: u64, insn: &[u8]| {
        core.set_gpr(RDX, port);
        match once(core, insn) {
            Err(Trap::Exit(Exit::PortIn { port: asked, .. })) => {
                assert_eq!(u64::from(asked), port & 0xffff);
                true
            }
            other => {
                assert_eq!(other.map_err(Some), Err(Some(Trap::gp(0))));
                assert_eq!(core.rip(), CODE);
                false
            }
        }
    };
    let in_eax: &[u8] = &[0xed];
    let mut core = user(104, 104 + 0x100);
    assert!(!allowed(&mut core, 0x60, IN_AL_DX));
    poke(&core, TSS + 104 + 12, &[0b1111_1110, 0xff]);
    assert!(allowed(&mut core, 0x60, IN_AL_DX));
    assert!(!allowed(&mut core, 0x61, IN_AL_DX));
    assert!(!allowed(&mut core, 0x60, in_eax), "all four bits count");
    poke(&core, TSS + 104 + 12, &[0b0011_1111, 0b1111_1100]);
    assert!(allowed(&mut core, 0x66, in_eax), "across a byte");
    assert!(!allowed(&mut core, 0x67, in_eax));
    // The second byte must be within the limit as well.
    poke(&core, TSS + 104, &[0; 0x200]);
    assert!(allowed(&mut core, 0x7ff, IN_AL_DX));
    assert!(!allowed(&mut core, 0x800, IN_AL_DX));
    // IOPL 3 needs no bitmap.
    core.set_rflags(rflags::IOPL | 2);
    assert!(allowed(&mut core, 0x800, IN_AL_DX));
    core.set_rflags(2);
    // No bitmap in a 16-bit TSS, nor beyond the limit.
    core.sys.tr.rights = 0x83;
    assert!(!allowed(&mut core, 0x60, IN_AL_DX));
    let mut core = user(0xffff, 0x67);
    assert!(!allowed(&mut core, 0, IN_AL_DX));
    // Virtual-8086 mode looks at the bitmap whatever IOPL is.
    let mut core = user(104, 104 + 0x100);
    core.sys.efer = 0;
    core.set_rflags(rflags::VM | rflags::IOPL | 2);
    assert!(crate::sys::io::permitted(&mut core, 0x60, 1).is_err());
}

#[test]
fn in_and_out_move_the_right_bytes() {
    let mut core = core16();
    core.set_gpr(RAX, 0x1122_3344_5566_7788);
    core.set_gpr(RDX, 0x1234_03f8);
    let seen = complete(&mut core, &[0xee], |_| 0).expect("out dx, al");
    assert_eq!(seen, [Exit::PortOut { port: 0x3f8, size: 1, data: 0x88 }]);
    let seen = complete(&mut core, &[0x66, 0xe7, 0x80], |_| 0).expect("out 80h, eax");
    assert_eq!(seen, [Exit::PortOut { port: 0x80, size: 4, data: 0x5566_7788 }]);
    let seen = complete(&mut core, &[0xe4, 0x64], |_| 0xaa).expect("in al, 64h");
    assert_eq!(seen, [Exit::PortIn { port: 0x64, size: 1 }]);
    assert_eq!(core.gpr(RAX), 0x1122_3344_5566_77aa);
    complete(&mut core, &[0x66, 0xed], |_| 0xdead_beef).expect("in eax, dx");
    assert_eq!(core.gpr(RAX), 0xdead_beef);
}

#[test]
fn strings_of_ports() {
    let mut core = core16();
    core.set_gpr(RDX, 0x1f0);
    core.set_gpr(RCX, 3);
    core.set_gpr(RDI, 0x4000);
    let mut next = 0x100;
    let seen = complete(&mut core, &[0xf3, 0x6d], |_| {
        next += 1;
        next
    })
    .expect("rep insw");
    assert_eq!(seen, vec![Exit::PortIn { port: 0x1f0, size: 2 }; 3]);
    assert_eq!(peek(&core, 0x4000, 6), [1, 1, 2, 1, 3, 1]);
    assert_eq!((core.gpr(RCX), core.gpr(RDI)), (0, 0x4006));
    core.set_gpr(RCX, 2);
    core.set_gpr(RSI, 0x4004);
    core.set_rflags(rflags::DF | 2);
    let seen = complete(&mut core, &[0xf3, 0x6f], |_| 0).expect("rep outsw");
    let out = |data| Exit::PortOut { port: 0x1f0, size: 2, data };
    assert_eq!(seen, [out(0x103), out(0x102)]);
    assert_eq!(core.gpr(RSI), 0x4000);
    core.set_gpr(RCX, 0);
    run(&mut core, &[0xf3, 0x6f]).expect("nothing");
}

#[test]
fn ins_asks_only_when_it_can_store() {
    let mut core = core64();
    core.set_rflags(rflags::IOPL | 2);
    protect(&mut core, 0x3_0000, 5);
    core.set_gpr(RDX, 0x1f0);
    core.set_gpr(RDI, 0x3_0000);
    assert_eq!(run(&mut core, &[0x6c]), page_fault(7, 0x3_0000));
    core.set_rflags(2);
    core.sys.tr.limit = 0;
    assert_eq!(run(&mut core, &[0x6c]), exception(13, Some(0)));
}

#[test]
fn io_breakpoints_watch_ports() {
    let mut core = core16();
    let out = |core: &mut Core, port: u64, insn: &[u8]| {
        core.set_gpr(RDX, port);
        core.watch_hit = 0;
        complete(core, insn, |_| 0).expect("in or out");
        std::mem::take(&mut core.watch_hit)
    };
    let (out_al, out_ax, in_eax): (&[u8], &[u8], &[u8]) = (&[0xee], &[0xef], &[0x66, 0xed]);
    // DR1: two ports from 3F8h on, enabled globally; DR2: four, enabled locally; DR3: likewise, not enabled.
    core.sys.dr = [0, 0x3f9, 0x3fa, 0x3f8];
    core.sys.dr7 = 0x400 | 1 << 3 | 1 << 4 | 0b0110 << 20 | 0b1110 << 24 | 0b0010 << 28;
    assert_eq!(out(&mut core, 0x3f8, out_al), 0, "not without CR4.DE");
    core.sys.cr4 |= wardian_cpu::bits::cr4::DE;
    assert_eq!(out(&mut core, 0x3f8, out_al), 6);
    assert_eq!(out(&mut core, 0x3f9, out_ax), 6);
    assert_eq!(out(&mut core, 0x3fb, out_al), 4);
    assert_eq!(out(&mut core, 0x3fc, out_al), 0);
    assert_eq!(out(&mut core, 0x3f7, out_al), 0);
    assert_eq!(out(&mut core, 0x3f7, out_ax), 6, "over the edge");
    assert_eq!(out(&mut core, 0x3f5, in_eax), 6);
    assert_eq!(out(&mut core, 0x3f4, in_eax), 0);
    // Every bit of the register counts, and nothing wraps.
    core.sys.dr[1] = 1 << 16 | 0x80;
    core.sys.dr[2] = !0;
    assert_eq!(out(&mut core, 0x80, out_al), 0);
    assert_eq!(out(&mut core, 0xffff, out_al), 0);
    // A faulting access has hit nothing.
    let mut core = user(0xffff, 0x67);
    core.sys.cr4 |= wardian_cpu::bits::cr4::DE;
    (core.sys.dr[0], core.sys.dr7) = (0x60, 0x400 | 2 | 2 << 16);
    core.set_gpr(RDX, 0x60);
    assert_eq!(run(&mut core, IN_AL_DX), exception(13, Some(0)));
    assert_eq!(core.watch_hit, 0);
}
