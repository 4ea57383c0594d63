#![no_main]
#![allow(missing_docs)]

libfuzzer_sys::fuzz_target!(|data: &[u8]| brep_fuzz::nbd_server_handshake(data));
