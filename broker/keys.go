package broker

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"spectrum-os.org/broker/failpoint"
)

const keyBlock = "SPECTRUM ED25519 SEED"

// loadKey reads the signing key in dir, or makes one there. A key that others
// can read is refused: whoever read it can mint tokens.
func loadKey(dir string) (ed25519.PrivateKey, error) {
	path := filepath.Join(dir, "signing-key.pem")
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return makeKey(dir, path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the signing key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot inspect the signing key: %w", err)
	}
	if mode := info.Mode(); !mode.IsRegular() || mode.Perm()&0o077 != 0 {
		return nil, fmt.Errorf("signing key %s has mode %v; it must be a file that only its owner can read (chmod 600)", path, mode)
	}
	raw, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return nil, fmt.Errorf("cannot read the signing key: %w", err)
	}
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != keyBlock || len(block.Bytes) != ed25519.SeedSize || len(rest) != 0 {
		return nil, fmt.Errorf("signing key %s is damaged: it is not one PEM block %q of %d bytes", path, keyBlock, ed25519.SeedSize)
	}
	return ed25519.NewKeyFromSeed(block.Bytes), nil
}

// makeKey writes the key under another name and links it into place, so that
// no reader ever sees half a key and none is written over.
func makeKey(dir, path string) (ed25519.PrivateKey, error) {
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed) // never fails
	f, err := os.CreateTemp(dir, ".signing-key-*")
	if err != nil {
		return nil, fmt.Errorf("cannot make a signing key: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := errors.Join(pem.Encode(f, &pem.Block{Type: keyBlock, Bytes: seed}), f.Sync()); err != nil {
		return nil, fmt.Errorf("cannot write the signing key: %w", err)
	}
	failpoint.Hit("key.written")
	if err := os.Link(f.Name(), path); err != nil {
		return nil, fmt.Errorf("cannot keep the signing key: %w", err)
	}
	failpoint.Hit("key.linked")
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot keep the signing key: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return nil, fmt.Errorf("cannot keep the signing key: %w", err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}
