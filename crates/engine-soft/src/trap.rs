//! Why an instruction did not complete.

use wardian_cpu::Exit;
use wardian_cpu::bits::vector;

/// An exception of the guest processor (Intel SDM vol. 3A, chapter 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0-31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// For #PF: the faulting linear address, to be put in CR2. For #DB: bits to be set in DR6.
    pub payload: u64,
}

/// What stops an instruction before it completes. Nothing of the instruction has been committed, except
/// the finished iterations of a string instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trap {
    /// An exception to deliver to the guest.
    Exception(Exception),
    /// The instruction needs an answer from the machine and is run again with it.
    Exit(Exit),
    /// The instruction is to be run again while no other vCPU runs guest code.
    Alone,
    /// The machine must reset: no handler could be reached.
    TripleFault,
}

/// Shorthand for what instruction helpers return.
pub type Result<T> = std::result::Result<T, Trap>;

impl Trap {
    fn plain(vector: u8, error: Option<u32>) -> Trap {
        Trap::Exception(Exception { vector, error, payload: 0 })
    }
    /// #UD.
    pub fn ud() -> Trap {
        Trap::plain(vector::UD, None)
    }
    /// #GP(error).
    pub fn gp(error: u32) -> Trap {
        Trap::plain(vector::GP, Some(error))
    }
    /// #SS(error).
    pub fn ss(error: u32) -> Trap {
        Trap::plain(vector::SS, Some(error))
    }
    /// #NP(error).
    pub fn np(error: u32) -> Trap {
        Trap::plain(vector::NP, Some(error))
    }
    /// #TS(error).
    pub fn ts(error: u32) -> Trap {
        Trap::plain(vector::TS, Some(error))
    }
    /// #NM.
    pub fn nm() -> Trap {
        Trap::plain(vector::NM, None)
    }
    /// #AC(0).
    pub fn ac() -> Trap {
        Trap::plain(vector::AC, Some(0))
    }
    /// #PF(error) at `linear`.
    pub fn pf(error: u32, linear: u64) -> Trap {
        Trap::Exception(Exception { vector: vector::PF, error: Some(error), payload: linear })
    }
    /// Any exception without an error code (#DE, #OF, #BR, #MF, #XM ...).
    pub fn vector(vector: u8) -> Trap {
        Trap::plain(vector, None)
    }
    /// #DB with these bits for DR6.
    pub fn db(dr6: u64) -> Trap {
        Trap::Exception(Exception { vector: vector::DB, error: None, payload: dr6 })
    }
}
