//! [`Ctx`]: the part of a vCPU that translated code addresses, and the TLB tables behind it.
//!
//! Host RBP points [`RBP_BIAS`] bytes into the context, the tables follow behind it: that makes the hot fields
//! reachable by an 8-bit displacement, and RBP's low six bits are 12, so RBP itself is the shift count of the TLB
//! probe (`shrx`).
//!
//! The user's tables and the bases exist once for each of the last few address spaces ([`SPACES`]). The context and the
//! supervisor's tables are mapped beside each of them: to go from one address space to another is to
//! change RBP.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU32;

use wardian_cpu::EngineError;

use crate::mode::Mode;

/// RBP - start of the context.
pub const RBP_BIAS: i32 = 140;
/// Entries of each TLB table: the index is bits 12-31 of the linear address.
pub const TLB_ENTRIES: usize = 1 << 20;
/// Slots of each jump cache.
pub const JUMP_ENTRIES: usize = 1 << 16;
/// Words for the bases of floating code: see [`crate::bases`].
pub const BASE_ENTRIES: usize = 1 << 18;
/// TLB and jump-cache views.
pub const VIEWS: usize = 3;

/// Address spaces whose user translations are kept.
pub const SPACES: usize = 8;

/// Which set of translations code uses: by privilege and, for the supervisor, whether user pages may be
/// touched (SMAP off or EFLAGS.AC set).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum View {
    /// CPL 3.
    User = 0,
    /// CPL 0-2 with SMAP in force.
    Kernel = 1,
    /// CPL 0-2, user pages accessible.
    KernelUser = 2,
}

/// Why translated code was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Leave {
    /// Direct jump not chained yet: `rip` is the target, `arg` the patch site.
    Chain = 0,
    /// Indirect jump or landing miss: `rip` is the target.
    Lookup = 1,
    /// The instruction at `rip` is for the interpreter.
    Interpret = 2,
    /// The interrupt word was set at the head of the block at `rip`.
    Attention = 3,
    /// A memory access stopped the instruction at `rip`: see [`crate::core::Core::trap`].
    Trap = 4,
    /// The host raised exception `arg` at `rip`.
    HostFault = 5,
    /// The instruction before `rip` completed and left work (device writes, invalidations).
    Completed = 6,
    /// The block at `rip` has more instructions than are left in the budget. Only where instructions are counted.
    Budget = 7,
    /// Jump to a floating block on another page, not chained or not to the one that is there now: `rip` is the target,
    /// `arg` the place of the compare.
    Edge = 8,
}

/// Number of reasons to leave.
pub const LEAVES: usize = 9;

/// What translated code and its thunks address through RBP.
#[repr(C, align(64))]
pub struct Ctx {
    /// General registers in encoding order. While translated code runs only R12-R15 are current here.
    pub gpr: [u64; 16], // 0
    /// Arithmetic flags as LAHF and SETO leave AX: AH = SF ZF 0 AF 0 PF 1 CF, AL = OF.
    pub flags: u32, // 128
    /// Not zero: leave at the next block head. See [`crate::vcpu`].
    pub attention: AtomicU32, // 132
    /// Linear address of the guest's next instruction (CS base added).
    pub rip: u64, // 136
    /// Bases of ES, CS, SS, DS, FS, GS.
    pub seg_base: [u64; 6], // 144
    /// Guest TSC - host TSC.
    pub tsc_offset: u64, // 192
    /// Scratch for borrowed registers.
    pub scratch: [u64; 2], // 200
    /// RFLAGS without the arithmetic flags (IF, DF, IOPL, AC ... and bit 1).
    pub rflags: u64, // 216
    /// Host stack pointer of `enter`.
    pub host_rsp: u64, // 224
    /// Why translated code was left ([`Leave`]).
    pub leave: u32, // 232
    /// Argument of `leave`.
    pub arg: u32, // 236
    /// What slow accesses hand back in R13 and R14.
    pub ret: [u64; 2], // 240
    /// What vector registers 0-15 hold: 0: XMM, 1: YMM (all above, and above bit 255 of registers 16-31, is zero),
    /// 2: ZMM. See [`crate::fpu`].
    pub vec_mode: u32, // 256
    /// Number of the block whose indirect jump was taken last (64-bit code).
    pub source: u32, // 260
    /// The owning [`crate::core::Core`].
    pub core: u64, // 264
    /// Not zero: vector registers 16-31 and the mask registers are in the host's own; zero: they are here.
    pub high_live: u32, // 272
    /// Where instructions are counted, in a slow access: how many of the block are not retired, the one that accesses
    /// included.
    pub left: u32, // 276
    /// Where instructions are counted: how many may be retired. Blocks take theirs at their head.
    pub budget: i64, // 280
    /// `IA32_KERNEL_GS_BASE`.
    pub kernel_gs_base: u64, // 288
    /// Mode of the code that runs, unless [`crate::core::Core::mode_dirty`].
    pub mode: Mode, // 296
    /// Not zero: an event waits for which the attention word was taken already, and which may only be held off by RFLAGS.
    pub held: u32, // 304
    /// Explicit padding.
    pub pad0: u32,
    /// What RBP is to be: it changes with the address space.
    pub rbp: u64, // 312
    /// Vector registers while a helper runs.
    pub vec: [[u8; 64]; 32], // 320
    /// AVX-512 mask registers likewise.
    pub mask: [u64; 8],
    /// XSAVE image of the guest while no translated code runs on this thread.
    pub xsave: [u8; 4096],
    /// XSAVE image of the host likewise (only what the ABI keeps: MXCSR and the x87 control word).
    pub host_mxcsr: u32,
    /// x87 control word of the host.
    pub host_fcw: u32,
    /// Bounce buffer for accesses that cannot go to RAM directly; aligned like a page.
    pub bounce: Bounce,
}

/// A page-aligned buffer of two pages, so that an access keeps its offset within a 64-byte line.
#[repr(C, align(4096))]
pub struct Bounce(pub [u8; 8192]);

const PAGE: usize = 4096;
const CTX_LEN: usize = (size_of::<Ctx>() + PAGE - 1) & !(PAGE - 1);
const TABLE_LEN: usize = TLB_ENTRIES * 8;
const JUMP_LEN: usize = JUMP_ENTRIES * 8;
const VIEW_LEN: usize = 3 * TABLE_LEN + JUMP_LEN;

/// Displacement from RBP of `offset` bytes into the context.
pub const fn disp(offset: usize) -> i32 {
    offset as i32 - RBP_BIAS
}

/// Displacement from RBP of a view's read tags.
pub const fn tag_read(view: View) -> i32 {
    disp(CTX_LEN + view as usize * VIEW_LEN)
}
/// Displacement from RBP of a view's write tags.
pub const fn tag_write(view: View) -> i32 {
    tag_read(view) + TABLE_LEN as i32
}
/// Displacement from RBP of a view's addends (host address of the page).
pub const fn addend(view: View) -> i32 {
    tag_read(view) + 2 * TABLE_LEN as i32
}
/// Displacement from RBP of a view's jump cache.
pub const fn jumps(view: View) -> i32 {
    tag_read(view) + 3 * TABLE_LEN as i32
}

/// Displacement from RBP of the bases.
pub const BASES: i32 = disp(CTX_LEN + VIEWS * VIEW_LEN);

/// Slot of the jump cache for `linear`; the same computation is emitted by the translator.
pub const fn jump_slot(linear: u64) -> usize {
    (((linear >> 12) as u32 ^ linear as u32) & 0xffff) as usize
}

/// Owner of a vCPU's context and tables.
pub struct CtxBox {
    /// The mappings, one for each address space.
    origin: *mut u8,
    /// That of the address space in use.
    base: *mut u8,
}

// SAFETY: the mapping is private to its owner; only `attention` is touched by other threads, atomically.
unsafe impl Send for CtxBox {}

/// Bytes from one address space's mapping to the next.
const SPACE_LEN: usize = CTX_LEN + VIEWS * VIEW_LEN + BASES_LEN;
const BASES_LEN: usize = BASE_ENTRIES * 8;

impl CtxBox {
    const LEN: usize = SPACES * SPACE_LEN;

    /// A zeroed context with empty tables.
    pub fn new() -> Result<CtxBox, EngineError> {
        let host = || {
            let error = std::io::Error::last_os_error();
            EngineError::Host(format!("no address space for the vCPU's TLB ({error})"))
        };
        // The context, the supervisor's tables, the user's tables and the bases of all spaces.
        let shared = CTX_LEN + (VIEWS - 1) * VIEW_LEN;
        let own = VIEW_LEN + BASES_LEN;
        let bytes = shared + SPACES * own;
        // SAFETY: plain system calls, whose results are checked before use; fixed mappings go only into the range that
        // was reserved here.
        unsafe {
            let fd = libc::memfd_create(c"wardian-tlb".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(host());
            }
            let fd = OwnedFd::from_raw_fd(fd);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            if libc::ftruncate(fd.as_raw_fd(), bytes as i64) != 0 {
                return Err(host());
            }
            let origin = libc::mmap(std::ptr::null_mut(), Self::LEN, libc::PROT_NONE, flags, -1, 0);
            if origin == libc::MAP_FAILED {
                return Err(host());
            }
            let origin: *mut u8 = origin.cast();
            let made = CtxBox { origin, base: origin };
            for space in 0..SPACES {
                for (at, len, from) in [
                    (0, CTX_LEN, 0),
                    (CTX_LEN, VIEW_LEN, shared + space * own),
                    (CTX_LEN + VIEW_LEN, (VIEWS - 1) * VIEW_LEN, CTX_LEN),
                    (CTX_LEN + VIEWS * VIEW_LEN, BASES_LEN, shared + space * own + VIEW_LEN),
                ] {
                    let address = origin.add(space * SPACE_LEN + at).cast();
                    let (access, flags) =
                        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
                    if libc::mmap(address, len, access, flags, fd.as_raw_fd(), from as i64)
                        == libc::MAP_FAILED
                    {
                        return Err(host());
                    }
                }
            }
            // Huge pages would make the sparse tables resident.
            libc::madvise(origin.cast(), Self::LEN, libc::MADV_NOHUGEPAGE);
            Ok(made)
        }
    }

    /// From now on the user's tables are those of `space`. Translated code must take RBP from [`Ctx::rbp`] then.
    pub fn select(&mut self, space: usize) {
        self.base = self.base_of(space);
        self.get_mut().rbp = self.base as u64 + RBP_BIAS as u64;
    }

    /// The context.
    pub fn get(&self) -> &Ctx {
        // SAFETY: the mapping starts with a Ctx, for which zero bytes are a valid value.
        unsafe { &*self.base.cast::<Ctx>() }
    }

    /// The context.
    pub fn get_mut(&mut self) -> &mut Ctx {
        // SAFETY: as in `get`, and self is borrowed exclusively.
        unsafe { &mut *self.base.cast::<Ctx>() }
    }

    /// Its address, for thunks and kickers.
    pub fn as_ptr(&self) -> *mut Ctx {
        self.base.cast()
    }

    fn at(&self, base: *mut u8, rbp_disp: i32, index: usize) -> *mut u64 {
        // SAFETY: callers pass a mapping's base, a table's displacement and an index below its length: inside the
        // mapping.
        unsafe { base.offset(RBP_BIAS as isize + rbp_disp as isize).cast::<u64>().add(index) }
    }

    /// Reads entry `index` (masked) of the table at `table`.
    #[inline]
    pub fn load(&self, table: i32, index: usize) -> u64 {
        // SAFETY: see `at`; the index is masked to the smaller table size by callers of jumps and bases
        // and to TLB_ENTRIES here.
        unsafe { self.at(self.base, table, index & (TLB_ENTRIES - 1)).read() }
    }

    /// Writes entry `index` (masked) of the table at `table`.
    #[inline]
    pub fn store(&mut self, table: i32, index: usize, value: u64) {
        // SAFETY: as in `load`; exclusive borrow.
        unsafe { self.at(self.base, table, index & (TLB_ENTRIES - 1)).write(value) }
    }

    fn base_of(&self, space: usize) -> *mut u8 {
        // SAFETY: the remainder makes it one of the mappings.
        unsafe { self.origin.add(space % SPACES * SPACE_LEN) }
    }

    /// As [`CtxBox::load`], of address space `space`.
    #[inline]
    pub fn load_in(&self, space: usize, table: i32, index: usize) -> u64 {
        // SAFETY: as in `load`.
        unsafe { self.at(self.base_of(space), table, index & (TLB_ENTRIES - 1)).read() }
    }

    /// As [`CtxBox::store`], of address space `space`.
    #[inline]
    pub fn store_in(&mut self, space: usize, table: i32, index: usize, value: u64) {
        // SAFETY: as in `store`.
        unsafe { self.at(self.base_of(space), table, index & (TLB_ENTRIES - 1)).write(value) }
    }
}

impl Drop for CtxBox {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, not used after this.
        unsafe { libc::munmap(self.origin.cast(), Self::LEN) };
    }
}
