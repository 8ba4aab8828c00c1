//! Emission of instructions as themselves: operands mapped, the memory operand replaced, the bytes copied.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::{ALL_FLAGS, Cold, Emit, Loc, Next, Op, Source};
use crate::access::{address_size, operand_segment};
use crate::blocks::Mark;
use crate::core::seg;
use crate::decode::{Field, Raw};
use crate::emit::{host_of, reg, reg::T0, reg::T1, scratch, seg_base, slot};
use crate::mode::Mode;
impl Emit<'_> {
    /// The effective address of `insn`'s memory operand in host register `to`. With `linear` the segment base is added.
    pub(super) fn address(&mut self, insn: &Instruction, to: u8, linear: bool, wide_result: bool) {
        let code64 = self.mode.code64();
        let asize = address_size(insn, code64);
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64();
        let segment = operand_segment(insn, self.mode.code64());
        let add_base = linear && self.mode.based(segment);
        let wide = asize == 8 && wide_result;
        if self.base != 0 && matches!(base, Register::RIP | Register::EIP) {
            self.place(to, disp, wide);
        } else if base == Register::RIP
            || base == Register::EIP
            || (base == Register::None && index == Register::None)
        {
            let mut value = disp;
            if asize == 4 || !code64 {
                value &= 0xffff_ffff;
            }
            if asize == 2 {
                value &= 0xffff;
            }
            if !wide_result {
                value &= 0xffff_ffff;
            }
            self.c.mov_imm(to, value);
        } else {
            let place = |e: &mut Self, r: Register, temp: u8| {
                let guest = r.number() as u8;
                host_of(guest).unwrap_or_else(|| {
                    e.c.load(temp, slot(guest));
                    temp
                })
            };
            let b = (base != Register::None).then(|| place(self, base, T0));
            let i =
                (index != Register::None).then(|| (place(self, index, T1), insn.memory_index_scale() as u8));
            self.c.lea(to, b, i, disp as i32, wide);
            if asize == 2 {
                // movzx to, to16
                self.c.put(&[0x40 | (to >> 3) << 2 | to >> 3, 0x0f, 0xb7, 0xc0 | (to & 7) << 3 | (to & 7)]);
            }
        }
        if add_base {
            self.c.load(T1, seg_base(segment));
            self.c.lea(to, Some(to), Some((T1, 1)), 0, code64);
        }
    }

    pub(super) fn lea(&mut self, op: &Op) {
        let insn = &op.insn;
        let dst = insn.op0_register();
        let guest = dst.number() as u8;
        let host = host_of(guest);
        match (dst.size(), host) {
            (2, _) => {
                self.address(insn, T0, false, true);
                match host {
                    Some(h) => self.c.put(&[0x66, 0x44 | h >> 3, 0x89, 0xe8 | h & 7]), // mov h16, r13w
                    None => {
                        self.c.put(&[0x66, 0x44, 0x89, 0x6d, slot(guest) as u8]); // mov [slot], r13w
                    }
                }
            }
            (size, Some(h)) => {
                // The destination may be the base or the index: LEA reads before it writes.
                self.address(insn, h, false, size == 8);
            }
            (size, None) => {
                self.address(insn, T0, false, size == 8);
                self.c.store(slot(guest), T0);
            }
        }
    }

    /// The target of an indirect jump or call into R13.
    pub(super) fn branch_operand(&mut self, op: &Op, source: &Source, rip: u64) {
        let insn = &op.insn;
        self.clobber(ALL_FLAGS);
        if insn.op0_kind() == OpKind::Memory {
            let size = self.stack_size();
            self.operand_check(op, rip, size, true, false, 0);
            self.pair_load(T0);
        } else {
            let guest = raw(op, source, self.mode).field(Field::Rm);
            match host_of(guest) {
                Some(h) if self.mode.code64() => self.c.mov(T0, h),
                Some(h) => self.c.mov32(T0, h),
                None => self.c.load(T0, slot(guest)),
            }
        }
    }

    /// Address and probe of `op`'s memory operand.
    pub(super) fn operand_check(
        &mut self,
        op: &Op,
        rip: u64,
        size: usize,
        read: bool,
        write: bool,
        live: u32,
    ) -> usize {
        let insn = &op.insn;
        let segment = operand_segment(insn, self.mode.code64());
        // A store through CS must fault.
        let flat = self.mode.flat(segment) && !(write && segment == seg::CS && !self.mode.code64());
        // The address is computed before the flags are saved: that needs R14, this R13 and R14.
        self.clobber(live);
        self.address(insn, T0, flat, true);
        let index = self.check(0, rip, size, read, write, segment, !flat);
        if insn.has_op_mask()
            && let Cold::Access { access, .. } = &mut self.cold[index]
        {
            *access = access.with_mask();
        }
        index
    }

    /// An instruction that is emitted as itself.
    pub(super) fn native(&mut self, op: &Op, source: &Source, rip: u64, next: u64) {
        let insn = &op.insn;
        let info = &op.info;
        let mut raw = raw(op, source, self.mode);
        let memory = info.mem_read || info.mem_write;
        let modifies = op.modifies != 0 || info.by_cl;
        let wanted = op.reads | if modifies { op.live_after & !op.kills } else { 0 };
        let mut index = None;
        if memory {
            let size = insn.memory_size().size();
            index = Some(self.operand_check(op, rip, size, info.mem_read, info.mem_write, op.live_before()));
        }
        let restore = wanted != 0 && self.loc == Loc::Slot;
        // Forms that 64-bit mode encodes differently.
        if raw.map == 0 && raw.vex.is_none() && raw.evex.is_none() {
            match raw.opcode {
                0x40..=0x4f if !self.mode.code64() => {
                    // INC/DEC r: FF /0, /1.
                    let (r, dec) = (raw.opcode & 7, raw.opcode >> 3 & 1);
                    raw.opcode = 0xff;
                    raw.modrm = Some(0xc0 | dec << 3 | r);
                }
                // An alias that 64-bit mode dropped.
                0x82 => raw.opcode = 0x80,
                0xa0..=0xa3 => {
                    // MOV with a plain offset: the forms with ModRM.
                    raw.opcode = [0x8a, 0x8b, 0x88, 0x89][(raw.opcode & 3) as usize];
                    raw.modrm = Some(0x04);
                    raw.imm = insn.len();
                }
                _ => {}
            }
        }
        let inc_dec_form = raw.map == 0 && raw.opcode == 0xff && info.gprs[0].field == Field::Opcode;
        // Where each general register operand goes.
        let mut fields: [(Field, u8, bool, bool); 4] = [(Field::None, 0, false, false); 4];
        let mut spilled: [(u8, u8, bool, bool); 3] = [(0, 0, false, false); 3]; // guest, host, load, written
        let mut spills = 0;
        let mut high = false;
        for (n, g) in info.gprs.iter().enumerate() {
            let field = if inc_dec_form && g.field == Field::Opcode { Field::Rm } else { g.field };
            if field == Field::None || (field == Field::Rm && raw.modrm.is_none_or(|m| m >> 6 != 3)) {
                continue;
            }
            let guest = raw.field(field);
            if g.byte && !raw.has_rex && (4..8).contains(&guest) {
                high = true;
                fields[n] = (field, guest, true, false);
                continue;
            }
            fields[n] = (field, guest, false, g.written);
            if host_of(guest).is_none() {
                let load = !(n == 0 && info.first_write_only);
                match spilled[..spills].iter_mut().find(|s| s.0 == guest) {
                    Some(s) => {
                        s.2 |= load;
                        s.3 |= g.written;
                    }
                    None if spills < 3 => {
                        spilled[spills] = (guest, 0, load, g.written);
                        spills += 1;
                    }
                    None => {}
                }
            }
        }
        let merged = memory && (spills > 0 || restore || high);
        if merged {
            self.c.merge();
        }
        if restore {
            self.c.restore_flags();
            self.loc = Loc::Both;
        }
        // Give spilled registers a host register.
        let mut temps: [Option<u8>; 4] =
            if memory { [Some(T1), None, None, None] } else { [Some(T0), Some(T1), None, None] };
        let mut borrowed = 0;
        let own = temps.iter().flatten().count();
        if spills > own {
            // Borrow registers that the instruction does not use.
            let used = used_registers(insn);
            let free = (0..12u8).filter(|r| *r != 4 && *r != 5 && used & (1 << r) == 0);
            for lender in free.take((spills - own).min(2)) {
                self.c.store(scratch(borrowed), lender);
                temps[own + borrowed] = Some(lender);
                borrowed += 1;
            }
        }
        let mut pool = temps.iter().flatten().copied();
        for s in &mut spilled[..spills] {
            s.1 = pool.next().unwrap_or(T1);
            if s.2 {
                self.c.load(s.1, slot(s.0));
            }
        }
        let host = |guest: u8| {
            host_of(guest)
                .unwrap_or_else(|| spilled[..spills].iter().find(|s| s.0 == guest).map_or(T1, |s| s.1))
        };
        // A high-byte register forbids REX: everything else must then be in a low register.
        let lender = reg::RSI;
        let mut lent = None;
        let mut map = |r: u8, e: &mut Self| {
            if high && r >= 8 {
                if lent.is_none() {
                    e.c.xchg(r, lender);
                    lent = Some(r);
                }
                lender
            } else {
                r
            }
        };
        let mut regs = [None; 5]; // by Field
        for (field, guest, is_high, _) in fields {
            if field == Field::None {
                continue;
            }
            let r = if is_high { guest } else { map(host(guest), self) };
            regs[field as usize] = Some(r);
        }
        let pointer = if memory { Some(if merged { map(T0, self) } else { T0 }) } else { None };
        if info.may_fault {
            let flags_live = self.loc != Loc::Slot;
            self.marks.push(Mark { host: self.c.pos(), flags_live, left: self.left, base: self.base, rip });
        }
        self.copy(&raw, &regs, pointer, merged, op, source, high);
        if let Some(r) = lent {
            self.c.xchg(r, lender);
        }
        for s in &spilled[..spills] {
            if s.3 {
                self.c.store(slot(s.0), s.1);
            }
        }
        for (n, lender) in temps[own..].iter().flatten().enumerate() {
            self.c.load(*lender, scratch(n));
        }
        if modifies {
            self.loc = Loc::Eflags;
        }
        if (info.mem_write || self.mode.watched())
            && let Some(index) = index
        {
            self.finish(index, Next::Linear(next), op.live_after);
        }
    }

    /// The bytes of the instruction with registers and memory operand replaced.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn copy(
        &mut self,
        raw: &Raw,
        regs: &[Option<u8>; 5],
        pointer: Option<u8>,
        merged: bool,
        op: &Op,
        source: &Source,
        high: bool,
    ) {
        let mut out = [0u8; 16];
        let mut n = 0;
        let mut put = |b: u8| {
            out[n] = b;
            n += 1;
        };
        let field = |f: Field, old: u8| regs[f as usize].unwrap_or(old);
        let reg_field = field(Field::Reg, raw.field(Field::Reg));
        let (mut x, mut b) = (0u8, 0u8);
        let mut tail = [0u8; 2];
        let mut tail_len = 0;
        let modrm = raw.modrm.map(|_| match pointer {
            Some(p) if !merged => {
                // [r14 + r13]
                debug_assert_eq!(p, T0);
                (x, b) = (1, 1);
                (tail[0], tail_len) = (0x2e, 1);
                (reg_field & 7) << 3 | 4
            }
            Some(p) => {
                // [p + 0]
                b = p >> 3;
                if p & 7 == 5 {
                    (tail[0], tail_len) = (0, 1);
                    0x40 | (reg_field & 7) << 3 | 5
                } else {
                    (reg_field & 7) << 3 | p & 7
                }
            }
            None => {
                let rm = field(Field::Rm, raw.field(Field::Rm));
                b = rm >> 3;
                // Vector registers keep their own high bits.
                0xc0 | (reg_field & 7) << 3 | rm & 7
            }
        });
        let mut opcode = raw.opcode;
        if let Some(r) = regs[Field::Opcode as usize]
            && raw.modrm.is_none()
        {
            opcode = opcode & 0xf8 | r & 7;
            b = r >> 3;
        }
        let r_bit = if raw.modrm.is_some() { reg_field >> 3 & 1 } else { 0 };
        if let Some([p0, p1, p2]) = raw.evex {
            // R', V', L'L, z, b and aaa stay; so does X where it extends a vector register.
            let vector_rm = pointer.is_none() && regs[Field::Rm as usize].is_none();
            let x = if vector_rm { raw.rex >> 1 & 1 } else { x };
            let p0 = if self.mode.code64() { p0 } else { p0 | 0x10 };
            put(0x62);
            put((1 - r_bit) << 7 | (1 - x) << 6 | (1 - b) << 5 | p0 & 0x1f);
            put(if self.mode.code64() { p1 } else { p1 | 0x40 });
            put(p2);
            put(opcode);
        }
        match raw.vex {
            _ if raw.evex.is_some() => {}
            Some((pp, l, vvvv)) => {
                let v = regs[Field::Vvvv as usize].unwrap_or(vvvv);
                put(0xc4);
                put((1 - r_bit) << 7 | (1 - x) << 6 | (1 - b) << 5 | raw.map);
                put((raw.rex & 8) << 4 | (!v & 15) << 3 | l << 2 | pp);
                put(opcode);
            }
            None => {
                let p66 = if self.mode.bitness() == 16 { op.info.wants_66 } else { raw.p66 };
                if p66 {
                    put(0x66);
                }
                if raw.rep != 0 {
                    put(raw.rep);
                }
                if raw.lock {
                    put(0xf0);
                }
                let rex = (raw.rex & 8) | r_bit << 2 | x << 1 | b;
                let byte_rex = raw.has_rex
                    || op.info.gprs.iter().any(|g| {
                        g.byte && g.field != Field::None && regs[g.field as usize].is_some_and(|r| r >= 4)
                    }) && !high;
                if rex != 0 || byte_rex {
                    put(0x40 | rex);
                }
                match raw.map {
                    1 => put(0x0f),
                    2 => {
                        put(0x0f);
                        put(0x38);
                    }
                    3 => {
                        put(0x0f);
                        put(0x3a);
                    }
                    _ => {}
                }
                put(opcode);
            }
        }
        if let Some(m) = modrm {
            put(m);
            for t in &tail[..tail_len] {
                put(*t);
            }
        }
        self.c.put_first(&out, n);
        let imm = &source.bytes[op.start + raw.imm..op.start + op.insn.len()];
        if !self.mode.code64()
            && let [selector] = imm
            && matches!(op.insn.mnemonic(), M::Vblendvps | M::Vblendvpd | M::Vpblendvb)
        {
            // Outside 64-bit mode the top bit of a register in an immediate does not count.
            self.c.put(&[selector & 0x7f]);
            return;
        }
        match source.bytes[op.start + raw.imm..].first_chunk::<8>() {
            Some(eight) if imm.len() <= 8 => self.c.put_first(eight, imm.len()),
            _ => self.c.put(imm),
        }
    }
}

pub(super) fn raw(op: &Op, source: &Source, mode: Mode) -> Raw {
    let bytes = &source.bytes[op.start..op.start + op.insn.len()];
    let a16 = op.insn.memory_base().size() == 2
        || op.insn.memory_index().size() == 2
        || (mode.bitness() != 64
            && op.insn.memory_base() == Register::None
            && op.insn.memory_index() == Register::None
            && op.insn.memory_displ_size() == 2);
    Raw::parse(bytes, mode.code64(), a16)
}

/// Host numbers of all general registers that `insn` names or implies.
fn used_registers(insn: &Instruction) -> u32 {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let mut used = 0;
    for r in factory.info(insn).used_registers() {
        let full = r.register().full_register();
        if full.is_gpr() {
            used |= 1 << full.number();
        }
    }
    used
}
