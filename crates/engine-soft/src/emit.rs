//! Byte emission: a cursor over code memory and the few host instructions that the translator adds itself.
//!
//! Host register use in translated code: RAX, RCX, RDX, RBX, RSI, RDI, R8-R11 are the guest's own; R15 is the
//! guest's RSP, R12 its RBP; guest R12-R15 live in the context; RBP is the context, RSP the host's stack, R13 and
//! R14 are temporaries.

use crate::bases::{self, Base};
use crate::code::CodeMemory;
use crate::ctx::disp;

/// Host register numbers.
pub mod reg {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RSI: u8 = 6;
    /// Guest RBP.
    pub const GBP: u8 = 12;
    /// First temporary.
    pub const T0: u8 = 13;
    /// Second temporary.
    pub const T1: u8 = 14;
    /// Guest RSP.
    pub const GSP: u8 = 15;
}
use reg::{GBP, GSP, T0, T1};

/// Host register of a guest register, or `None` if it lives in the context.
pub fn host_of(guest: u8) -> Option<u8> {
    match guest {
        4 => Some(GSP),
        5 => Some(GBP),
        0..=11 => Some(guest),
        _ => None,
    }
}

/// Displacement from RBP of a guest register's context slot.
pub fn slot(guest: u8) -> i32 {
    disp(guest as usize * 8)
}

/// Displacement of the flags slot.
pub const FLAGS: i32 = disp(128);
/// Displacement of the attention word.
pub const ATTENTION: i32 = disp(132);
/// Displacement of the number of the last block that jumped indirectly.
pub const SOURCE: i32 = disp(260);
/// Displacement of the width of the vector registers.
const VEC_MODE: i32 = disp(256);
/// Displacement of whether the upper vector registers are live.
const HIGH_LIVE: i32 = disp(272);
/// Displacement of the instructions of the block that a slow access leaves.
const LEFT: i32 = disp(276);
/// Displacement of the budget.
const BUDGET: i32 = disp(280);
/// Displacement of a segment base.
pub const fn seg_base(segment: usize) -> i32 {
    disp(144 + segment * 8)
}
/// Displacement of a scratch slot.
pub const fn scratch(index: usize) -> i32 {
    disp(200 + index * 8)
}

/// A cursor that writes host instructions.
pub struct Cursor<'a> {
    code: &'a mut CodeMemory,
    at: u32,
}

impl<'a> Cursor<'a> {
    /// A cursor at offset `at`.
    pub fn new(code: &'a mut CodeMemory, at: u32) -> Cursor<'a> {
        Cursor { code, at }
    }

    /// Offset of the next byte.
    #[inline]
    pub fn pos(&self) -> u32 {
        self.at
    }

    /// Appends bytes.
    #[inline]
    pub fn put(&mut self, bytes: &[u8]) {
        self.code.put(self.at, bytes);
        self.at += bytes.len() as u32;
    }

    /// Appends the first `len` of `bytes`. (Copies all of them: a fixed number is faster, what is behind is written over.)
    #[inline]
    pub fn put_first<const N: usize>(&mut self, bytes: &[u8; N], len: usize) {
        debug_assert!(len <= N);
        self.code.put(self.at, bytes);
        self.at += len as u32;
    }

    /// Appends the `len` bytes at `from` once more.
    pub fn repeat(&mut self, from: u32, len: u32) {
        self.code.repeat(from, len, self.at);
        self.at += len;
    }

    /// Moves the cursor to `at`.
    pub fn seek(&mut self, at: u32) {
        self.at = at;
    }

    /// The code memory.
    pub fn memory(&mut self) -> &mut CodeMemory {
        self.code
    }

    #[inline]
    fn byte(&mut self, b: u8) {
        self.put(&[b]);
    }

    /// ModRM (and displacement) for `[rbp + d]` with register field `r`.
    fn rbp_modrm(&mut self, r: u8, d: i32) {
        if let Ok(short) = i8::try_from(d) {
            self.put(&[0x45 | (r & 7) << 3, short as u8]);
        } else {
            self.byte(0x85 | (r & 7) << 3);
            self.put(&d.to_le_bytes());
        }
    }

    /// `mov r64, [rbp + d]`.
    pub fn load(&mut self, r: u8, d: i32) {
        self.put(&[0x48 | (r >> 3) << 2, 0x8b]);
        self.rbp_modrm(r, d);
    }
    /// `mov [rbp + d], r64`.
    pub fn store(&mut self, d: i32, r: u8) {
        self.put(&[0x48 | (r >> 3) << 2, 0x89]);
        self.rbp_modrm(r, d);
    }
    /// `mov r64, r64`.
    pub fn mov(&mut self, to: u8, from: u8) {
        self.put(&[0x48 | (from >> 3) << 2 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | (to & 7)]);
    }
    /// `mov r32, r32`.
    pub fn mov32(&mut self, to: u8, from: u8) {
        self.put(&[0x40 | (from >> 3) << 2 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | (to & 7)]);
    }
    /// `xchg r64, r64`.
    pub fn xchg(&mut self, a: u8, b: u8) {
        self.put(&[0x48 | (a >> 3) << 2 | b >> 3, 0x87, 0xc0 | (a & 7) << 3 | (b & 7)]);
    }
    /// The shortest `mov r64, value`.
    pub fn mov_imm(&mut self, r: u8, value: u64) {
        if value <= 0xffff_ffff {
            if r >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | r & 7);
            self.put(&(value as u32).to_le_bytes());
        } else if value as i64 == i64::from(value as i32) {
            self.put(&[0x48 | r >> 3, 0xc7, 0xc0 | r & 7]);
            self.put(&(value as u32).to_le_bytes());
        } else {
            self.put(&[0x48 | r >> 3, 0xb8 | r & 7]);
            self.put(&value.to_le_bytes());
        }
    }
    /// `lea r, [base + index * scale + d]` of 64 (`wide`) or 32 bits; index is not RSP; base may be absent.
    pub fn lea(&mut self, r: u8, base: Option<u8>, index: Option<(u8, u8)>, d: i32, wide: bool) {
        let mut rex = 0x40 | u8::from(wide) << 3 | (r >> 3) << 2;
        rex |= index.map_or(0, |(i, _)| i >> 3) << 1 | base.map_or(0, |b| b >> 3);
        let sib = index.is_some() || base.is_none() || base.is_some_and(|b| b & 7 == 4);
        let (mode, bytes): (u8, usize) = match base {
            None => (0, 4),
            Some(b) if d == 0 && b & 7 != 5 => (0, 0),
            Some(_) if i8::try_from(d).is_ok() => (0x40, 1),
            Some(_) => (0x80, 4),
        };
        self.put(&[rex, 0x8d]);
        let rm = if sib { 4 } else { base.unwrap_or(4) & 7 };
        self.byte(mode | (r & 7) << 3 | rm);
        if sib {
            let (i, scale) = index.map_or((4, 1u8), |(i, s)| (i & 7, s));
            self.byte((scale.trailing_zeros() as u8) << 6 | i << 3 | base.map_or(5, |b| b & 7));
        }
        self.put(&d.to_le_bytes()[..bytes]);
    }
    /// `lea r, [r + d]` in as many steps as it takes.
    pub fn add(&mut self, r: u8, d: i64, wide: bool) {
        let first = d.clamp(i64::from(i32::MIN), i64::from(i32::MAX));
        self.lea(r, Some(r), None, first as i32, wide);
        if first != d {
            self.lea(r, Some(r), None, (d - first) as i32, wide);
        }
    }
    /// `mov r64, [rbp + base]`.
    pub fn load_base(&mut self, r: u8, base: Base) {
        self.load(r, bases::disp(base));
    }
    /// `cmp r64, [rbp + base]`: returns where the displacement of the base is.
    pub fn cmp_base(&mut self, r: u8, base: Base) -> u32 {
        self.put(&[0x48 | (r >> 3) << 2, 0x3b, 0x85 | (r & 7) << 3]);
        let site = self.pos();
        self.put(&bases::disp(base).to_le_bytes());
        site
    }
    /// `lea r13, [r13 + r14]`: the host address of a checked access in one register.
    pub fn merge(&mut self) {
        self.lea(T0, Some(T1), Some((T0, 1)), 0, true);
    }
    /// `jmp rel32` to offset `target`.
    pub fn jmp(&mut self, target: u32) {
        self.byte(0xe9);
        self.rel32(target);
    }
    /// `call rel32`.
    pub fn call(&mut self, target: u32) {
        self.byte(0xe8);
        self.rel32(target);
    }
    /// `jcc rel32` with condition code `cc`.
    pub fn jcc(&mut self, cc: u8, target: u32) {
        self.put(&[0x0f, 0x80 | cc]);
        self.rel32(target);
    }
    /// A 32-bit displacement to `target`, counted from its own end.
    pub fn rel32(&mut self, target: u32) {
        let rel = target.wrapping_sub(self.pos().wrapping_add(4));
        self.put(&rel.to_le_bytes());
    }
    /// `cmp dword [rbp + attention], 0`.
    pub fn cmp_attention(&mut self) {
        self.put(&[0x83, 0x7d, ATTENTION as u8, 0]);
    }

    /// The TLB probe for a linear address in R13: leaves the page offset in R13 and the host page in R14, or goes
    /// to a stub by the `ja` whose displacement's offset is returned. Clobbers flags.
    ///
    /// `lea` was done; `shrx r14d, r13d, ebp; xor r13, [rbp + r14*8 + tag]; cmp r13, 4096 - size; ja stub;
    /// mov r14, [rbp + r14*8 + addend]`.
    pub fn probe(&mut self, size: u16, tag: i32, addend: i32) -> u32 {
        self.put(&[0xc4, 0x42, 0x53, 0xf7, 0xf5]); // shrx r14d, r13d, ebp
        self.xor_tag(tag);
        self.put(&[0x49, 0x81, 0xfd]);
        self.put(&(4096 - i32::from(size)).to_le_bytes());
        self.put(&[0x0f, 0x87]);
        let site = self.pos();
        self.put(&[0; 4]);
        self.put(&[0x4e, 0x8b, 0xb4, 0xf5]); // mov r14, [rbp + r14*8 + d32]
        self.put(&addend.to_le_bytes());
        site
    }
    /// `xor r13, [rbp + r14*8 + tag]`: applies a tag, or takes it off again.
    pub fn xor_tag(&mut self, tag: i32) {
        self.put(&[0x4e, 0x33, 0xac, 0xf5]);
        self.put(&tag.to_le_bytes());
    }

    /// Saves EFLAGS' arithmetic flags in the slot; uses R14.
    pub fn save_flags(&mut self) {
        self.mov(T1, reg::RAX);
        self.put(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.put(&[0x66, 0x89]);
        self.rbp_modrm(0, FLAGS); // mov [slot], ax
        self.mov(reg::RAX, T1);
    }
    /// Restores EFLAGS' arithmetic flags from the slot; uses R14.
    pub fn restore_flags(&mut self) {
        self.mov(T1, reg::RAX);
        self.put(&[0x0f, 0xb7]);
        self.rbp_modrm(0, FLAGS); // movzx eax, word [slot]
        self.put(&[0x04, 0x7f, 0x9e]); // add al, 7fh; sahf
        self.mov(reg::RAX, T1);
    }

    /// Jumps through the jump cache at `table` to the linear address in R13; flags must be in the slot.
    pub fn jump_indirect(&mut self, table: i32) {
        self.put(&[0xc4, 0x42, 0xd3, 0xf7, 0xf5]); // shrx r14, r13, rbp
        self.put(&[0x45, 0x31, 0xee]); // xor r14d, r13d
        self.put(&[0x45, 0x0f, 0xb7, 0xf6]); // movzx r14d, r14w
        self.put(&[0x42, 0xff, 0xa4, 0xf5]); // jmp [rbp + r14*8 + table]
        self.put(&table.to_le_bytes());
    }
    /// `mov dword [rbp + vec_mode], 2`.
    pub fn widen(&mut self) {
        self.put(&[0xc7, 0x45, VEC_MODE as u8, 2, 0, 0, 0]);
    }
    /// `cmp dword [rbp + high_live], 0; je`: returns where its displacement is. Clobbers flags.
    pub fn need_high(&mut self) -> u32 {
        self.put(&[0x83]);
        self.rbp_modrm(7, HIGH_LIVE);
        self.put(&[0, 0x0f, 0x84]);
        let site = self.pos();
        self.put(&[0; 4]);
        site
    }
    /// `sub qword [rbp + budget], count; js`: returns where its displacement is. Clobbers flags.
    pub fn take(&mut self, count: u8) -> u32 {
        self.put(&[0x48, 0x83]);
        self.rbp_modrm(5, BUDGET);
        self.put(&[count, 0x0f, 0x88]);
        let site = self.pos();
        self.put(&[0; 4]);
        site
    }
    /// `add qword [rbp + budget], count`, unless that is 0. Clobbers flags.
    pub fn give_back(&mut self, count: u8) {
        if count != 0 {
            self.put(&[0x48, 0x83]);
            self.rbp_modrm(0, BUDGET);
            self.put(&[count]);
        }
    }
    /// `mov dword [rbp + left], count`.
    pub fn note_left(&mut self, count: u8) {
        self.put(&[0xc7]);
        self.rbp_modrm(0, LEFT);
        self.put(&u32::from(count).to_le_bytes());
    }
    /// `mov dword [rbp + source], block`.
    pub fn note_source(&mut self, block: u32) {
        self.put(&[0xc7, 0x45, SOURCE as u8]);
        self.put(&block.to_le_bytes());
    }
    /// Jumps through a jump-cache slot known at translation time.
    pub fn jump_slot(&mut self, table: i32, slot: usize) {
        self.put(&[0xff, 0xa5]); // jmp [rbp + d32]
        self.put(&(table + slot as i32 * 8).to_le_bytes());
    }
}
