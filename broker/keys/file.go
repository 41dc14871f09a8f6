package keys

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
)

const (
	keyBlock = "SPECTRUM ED25519 SEED"
	// fileName is the current key's file, and nextName that of a key which the
	// ledger may or may not have made current yet.
	fileName = "signing-key.pem"
	nextName = "signing-key.next.pem"

	ledgerHeader = "Ledger"
	epochHeader  = "Epoch"
)

// file is what a key's file holds.
type file struct {
	private ed25519.PrivateKey
	// Which ledger and epoch the key is of; zero in files of earlier releases.
	ledger uuid.UUID
	epoch  uint64
}

func (f *file) kid() string { return ledger.KID(f.private.Public().(ed25519.PublicKey)) }

// mark is what the file says of the ledger, or nil.
func (f *file) mark() *ledger.Mark {
	if f == nil || f.ledger == uuid.Nil {
		return nil
	}
	return &ledger.Mark{Ledger: f.ledger, Epoch: f.epoch}
}

// readFile reads a key; nil where there is no such file. One that others can
// read is refused: whoever read it can mint tokens.
func readFile(path string) (*file, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // that there is none is no failure
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
		return nil, fmt.Errorf("signing key %s has mode %v; it must be a file that only its owner can read (chmod 600). "+
			"If somebody may have read it, put a new one in its place and revoke it: spectrum-cap keys revoke", path, mode)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("signing key %s belongs to user %d, who can read it; it must belong to user %d. "+
			"Chown it, and then put a new one in its place and revoke it: spectrum-cap keys revoke", path, st.Uid, os.Geteuid())
	}
	raw, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return nil, fmt.Errorf("cannot read the signing key: %w", err)
	}
	k, err := decode(raw)
	if err != nil {
		return nil, fmt.Errorf("signing key %s is damaged: %w", path, err)
	}
	return k, nil
}

// decode accepts only what encode wrote, or the release before, which named no
// ledger.
func decode(raw []byte) (*file, error) {
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != keyBlock || len(block.Bytes) != ed25519.SeedSize || len(rest) != 0 {
		return nil, fmt.Errorf("it is not one PEM block %q of %d bytes", keyBlock, ed25519.SeedSize)
	}
	k := &file{private: ed25519.NewKeyFromSeed(block.Bytes)}
	if len(block.Headers) > 0 {
		id, idErr := uuid.Parse(block.Headers[ledgerHeader])
		epoch, epochErr := strconv.ParseUint(block.Headers[epochHeader], 10, 64)
		if idErr != nil || epochErr != nil || id == uuid.Nil || epoch == 0 || len(block.Headers) != 2 {
			return nil, fmt.Errorf("its headers are not %s and %s", ledgerHeader, epochHeader)
		}
		k.ledger, k.epoch = id, epoch
	}
	if !bytes.Equal(encode(k), raw) {
		return nil, errors.New("it is not in its one form")
	}
	return k, nil
}

func encode(k *file) []byte {
	block := &pem.Block{Type: keyBlock, Bytes: k.private.Seed()}
	if k.ledger != uuid.Nil {
		block.Headers = map[string]string{ledgerHeader: k.ledger.String(), epochHeader: strconv.FormatUint(k.epoch, 10)}
	}
	return pem.EncodeToMemory(block)
}

// newFile is a new key of a ledger and an epoch.
func newFile(id uuid.UUID, epoch uint64) *file {
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed) // never fails
	return &file{private: ed25519.NewKeyFromSeed(seed), ledger: id, epoch: epoch}
}

// stage makes a key durable beside the current one. It is written under another
// name first, so that no reader ever sees half a key.
func stage(dir string, k *file) error {
	f, err := os.CreateTemp(dir, ".signing-key-*")
	if err != nil {
		return fmt.Errorf("cannot make a signing key: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(encode(k))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("cannot write the signing key: %w", err)
	}
	failpoint.Hit("key.written")
	if err := os.Rename(f.Name(), filepath.Join(dir, nextName)); err != nil {
		return fmt.Errorf("cannot keep the signing key: %w", err)
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	failpoint.Hit("key.staged")
	return nil
}

// promote puts the staged key in the current one's place, and destroys that as
// far as a file system lets anybody: its bytes are written over.
func promote(dir string) error {
	failpoint.Hit("key.promote.before")
	path := filepath.Join(dir, fileName)
	old, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err == nil {
		defer old.Close()
	}
	if err := os.Rename(filepath.Join(dir, nextName), path); err != nil {
		return fmt.Errorf("cannot put the new signing key in its place: %w", err)
	}
	failpoint.Hit("key.promote.after")
	if err := syncDir(dir); err != nil {
		return err
	}
	if old != nil {
		if info, err := old.Stat(); err == nil && info.Mode().IsRegular() && info.Size() <= 4096 {
			_, err = old.WriteAt(make([]byte, info.Size()), 0)
			_ = errors.Join(err, old.Sync()) // its name is gone already
		}
	}
	return nil
}

// unstage takes a staged key away again.
func unstage(dir string) error {
	if err := os.Remove(filepath.Join(dir, nextName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove a signing key that never was in use: %w", err)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("cannot keep the signing key: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("cannot keep the signing key: %w", err)
	}
	return nil
}
