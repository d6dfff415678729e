//! With a real CRIU.
