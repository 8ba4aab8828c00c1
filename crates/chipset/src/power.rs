//! What the guest asks of the machine as a whole.

/// A request of the guest to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft off (ACPI S5).
    PowerOff,
    /// Reset (reset register, i8042 pulse, port CF9h).
    Reset,
    /// The test guest's debug-exit port was written with this code.
    DebugExit(u32),
}

/// Where such a request goes. Must not block.
pub trait PowerSink: Send + Sync {
    /// The guest asks for `request`.
    fn request(&self, request: PowerRequest);
}
