//! Instructions for the interpreter that are short enough to be emitted: flags that only the system may change, SWAPGS,
//! PUSHF, PUSH of memory, and bit strings.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::{ALL_FLAGS, Cold, Emit, Loc, Next, Op, Source};
use crate::access::{address_size, operand_segment};
use crate::core::seg;
use crate::ctx::{self, Ctx, Leave, View, disp};
use crate::decode::Class;
use crate::emit::{FLAGS, host_of, reg::T0, reg::T1, scratch, seg_base, slot};
use crate::mode::Mode;

/// Displacement of byte `n` of RFLAGS; the arithmetic flags are elsewhere.
const fn flags_byte(n: usize) -> u8 {
    disp(std::mem::offset_of!(Ctx, rflags) + n) as u8
}
/// IF and DF in their byte, AC in its.
const IF: u8 = 1 << 1;
const DF: u8 = 1 << 2;
const AC: u8 = 1 << 2;

/// Whether `insn`, one for the interpreter, can be emitted in `mode` all the same.
pub(super) fn emitted(insn: &Instruction, mode: Mode) -> bool {
    if mode.single() || mode.watched() || !mode.code64() {
        return false;
    }
    match insn.mnemonic() {
        M::Cld | M::Std => true,
        M::Pushfq => mode.stack_native(),
        M::Push => {
            let whole = insn.op0_kind() == OpKind::Memory && insn.memory_size().size() == 8;
            whole && insn.stack_pointer_increment() == -8 && mode.stack_native()
        }
        M::Cli | M::Sti | M::Swapgs => mode.ring0(),
        M::Stac | M::Clac => mode.ring0() && mode.smap(),
        M::Bt | M::Bts | M::Btr | M::Btc => {
            let memory = insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register;
            let size = insn.memory_size().size();
            let flat = mode.flat(operand_segment(insn, true));
            memory && flat && size >= 4 && address_size(insn, true) == 8
        }
        _ => false,
    }
}

/// Whether `ops[at]` must not be emitted where it stands: an STI holds interrupts off over the next instruction, which
/// must be one that does not look at them by itself, and in the same block.
pub(super) fn misplaced(ops: &[Op], at: usize) -> bool {
    let next = ops.get(at + 1).map(|op| op.info.class);
    ops[at].info.class == Class::System
        && ops[at].insn.mnemonic() == M::Sti
        && matches!(next, None | Some(Class::Unknown | Class::Interpret | Class::System))
}

/// Whether the block ends with it: what follows is for the other view.
pub(super) fn ends(insn: &Instruction, mode: Mode) -> bool {
    match insn.mnemonic() {
        M::Stac => mode.view() == View::Kernel,
        M::Clac => mode.view() == View::KernelUser,
        _ => false,
    }
}

impl Emit<'_> {
    fn clear_bits(&mut self, byte: usize, bits: u8) {
        self.c.put(&[0x80, 0x65, flags_byte(byte), !bits]);
    }
    fn set_bits(&mut self, byte: usize, bits: u8) {
        self.c.put(&[0x80, 0x4d, flags_byte(byte), bits]);
    }
    /// After a comparison: leaves to the run loop at `rip` if it was not equal.
    fn quit_if_not_equal(&mut self, why: Leave, rip: u64) {
        self.c.put(&[0x0f, 0x85]);
        let site = self.c.pos();
        self.c.put(&[0; 4]);
        self.cold.push(Cold::Quit { site, why, rip });
    }

    /// Emits a system instruction; says whether it ended the block.
    pub(super) fn system(&mut self, op: &Op, source: &Source, rip: u64, next: u64) -> bool {
        match op.insn.mnemonic() {
            M::Cld => {
                self.clobber(op.live_before());
                self.clear_bits(1, DF);
            }
            M::Std => {
                self.clobber(op.live_before());
                self.set_bits(1, DF);
            }
            M::Cli => {
                self.clobber(op.live_before());
                if op.start > 0 {
                    // Interrupts right behind an STI must not be hidden for ever.
                    self.c.cmp_attention();
                    self.quit_if_not_equal(Leave::Attention, rip);
                }
                self.clear_bits(1, IF);
            }
            M::Sti => {
                self.clobber(op.live_before());
                // What waits already comes in by way of the run loop, what comes later by the attention word.
                self.c.put(&[0x83, 0xbd]); // cmp dword [rbp + held], 0
                self.c.put(&disp(std::mem::offset_of!(Ctx, held)).to_le_bytes());
                self.c.put(&[0]);
                self.quit_if_not_equal(Leave::Interpret, rip);
                self.set_bits(1, IF);
            }
            M::Swapgs => {
                let kernel = disp(std::mem::offset_of!(Ctx, kernel_gs_base));
                self.c.load(T0, seg_base(seg::GS));
                self.c.load(T1, kernel);
                self.c.store(seg_base(seg::GS), T1);
                self.c.store(kernel, T0);
            }
            M::Stac | M::Clac => return self.user_pages(op, next),
            M::Bt | M::Bts | M::Btr | M::Btc => self.bit_string(op, rip, next),
            M::Pushfq => {
                self.clobber(ALL_FLAGS);
                self.c.put(&[0x44, 0x0f, 0xb6, 0x6d, (FLAGS + 1) as u8]); // movzx r13d, byte [flags + 1]
                self.c.put(&[0x44, 0x0f, 0xb6, 0x75, FLAGS as u8]); // movzx r14d, byte [flags]
                self.c.put(&[0x41, 0xc1, 0xe6, 11]); // shl r14d, 11
                self.c.put(&[0x4d, 0x09, 0xf5]); // or r13, r14
                self.c.put(&[0x4c, 0x0b, 0x6d, flags_byte(0)]); // or r13, [rflags]
                self.push_pending(op, rip, next);
            }
            _ => {
                self.branch_operand(op, source, rip);
                self.push_pending(op, rip, next);
            }
        }
        false
    }

    /// BT, BTS, BTR and BTC on memory with the bit's number in a register: it reaches beyond the operand.
    fn bit_string(&mut self, op: &Op, rip: u64, next: u64) {
        let insn = &op.insn;
        let size = insn.memory_size().size();
        let wide = u8::from(size == 8) << 3;
        let write = insn.mnemonic() != M::Bt;
        let guest = insn.op1_register().number() as u8;
        let keep = op.live_after & !op.kills != 0;
        self.clobber(op.live_before());
        self.address(insn, T0, true, true);
        match host_of(guest) {
            Some(h) if size == 8 => self.c.mov(T1, h),
            Some(h) => self.c.put(&[0x4c | h >> 3, 0x63, 0xf0 | h & 7]), // movsxd r14, h32
            None if size == 8 => self.c.load(T1, slot(guest)),
            None => self.c.put(&[0x4c, 0x63, 0x75, slot(guest) as u8]), // movsxd r14, [slot]
        }
        let shift = if size == 8 { 6 } else { 5 };
        self.c.put(&[0x49, 0xc1, 0xfe, shift]); // sar r14, 5 or 6
        self.c.lea(T0, Some(T0), Some((T1, size as u8)), 0, true);
        let segment = operand_segment(insn, true);
        let index = self.check(0, rip, size, true, write, segment, false);
        self.c.merge();
        let load = |e: &mut Self| match host_of(guest) {
            Some(h) => e.c.mov(T1, h),
            None => e.c.load(T1, slot(guest)),
        };
        if write {
            load(self);
            self.c.put(&[0x41, 0x83, 0xe6, 8 * size as u8 - 1]); // and r14d, bits - 1
            if keep {
                self.c.store(scratch(0), T1);
                self.c.restore_flags();
                self.c.load(T1, scratch(0));
            }
            if insn.has_lock_prefix() {
                self.c.put(&[0xf0]);
            }
            let opcode = match insn.mnemonic() {
                M::Bts => 0xab,
                M::Btr => 0xb3,
                _ => 0xbb,
            };
            self.c.put(&[0x45 | wide, 0x0f, opcode, 0x75, 0]); // op [r13], r14
        } else {
            if keep {
                self.c.restore_flags();
            }
            load(self);
            self.c.put(&[0x45 | wide, 0x8b, 0x6d, 0]); // mov r13, [r13]
            self.c.put(&[0x45 | wide, 0x0f, 0xa3, 0xf5]); // bt r13, r14
        }
        self.loc = Loc::Eflags;
        if write {
            self.finish(index, Next::Linear(next), op.live_after);
        }
    }

    /// Pushes R13.
    fn push_pending(&mut self, op: &Op, rip: u64, next: u64) {
        self.c.store(scratch(0), T0);
        self.push(op, rip, Next::Linear(next), |e| {
            e.c.merge();
            e.c.load(T1, scratch(0));
            e.single_store(T1);
        });
    }

    /// STAC and CLAC with SMAP on: the rest goes on in the other view. Says whether there is a change.
    fn user_pages(&mut self, op: &Op, next: u64) -> bool {
        let open = op.insn.mnemonic() == M::Stac;
        let view = if open { View::KernelUser } else { View::Kernel };
        if view == self.mode.view() {
            return false;
        }
        self.clobber(op.live_after);
        if open {
            self.set_bits(2, AC);
        } else {
            self.clear_bits(2, AC);
        }
        self.c.put(&[0xc7, 0x85]); // mov dword [rbp + mode], bits
        self.c.put(&disp(std::mem::offset_of!(Ctx, mode)).to_le_bytes());
        self.c.put(&self.mode.with_view(view).bits().to_le_bytes());
        self.c.mov_imm(T0, next);
        self.c.jump_slot(ctx::jumps(view), ctx::jump_slot(next));
        true
    }
}
